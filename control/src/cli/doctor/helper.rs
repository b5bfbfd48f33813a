//! Whether the daemon's containers are entered by a helper, and whether that would be of use here.

use super::Finding;
use crate::cli::daemon_client::{self, Description};
use crate::daemon::rpc::client::Client;
use crate::docker::helper_container::{ACCESS, HelperState};

const WHAT: &str = "Docker helper";

/// What the daemon says of its helper; without one, whether there is a use for it: Docker is open to this user, and its
/// containers are closed.
pub(super) fn helper(is_of_use: bool) -> Finding {
    let description = crate::sys::paths::Home::from_environment()
        .ok()
        .and_then(|home| daemon_client::describe(&Client::new(home.socket())).ok().flatten());
    finding(description.as_ref(), is_of_use)
}

fn finding(description: Option<&Description>, is_of_use: bool) -> Finding {
    if let Some(helper) = description.and_then(|description| description.docker_helper.as_ref()) {
        let name = &helper.container;
        return match (helper.state, &helper.reason) {
            (HelperState::Running, _) => Finding::ok(WHAT, format!("{name} runs; {ACCESS}")),
            (HelperState::Starting, _) => Finding::ok(WHAT, format!("{name} is being made")),
            (HelperState::Failed, reason) => {
                let reason = reason.as_deref().unwrap_or("for no reason that is known");
                let hint = "the daemon tries again by itself; landfall down, and up without --docker-helper, does without";
                Finding::lack(WHAT, format!("{name} cannot be had: {reason}"), hint)
            }
        };
    }
    if !is_of_use {
        return Finding::ok(WHAT, "not in use, and of no use to this user here");
    }
    let hint =
        format!("landfall up --docker-helper keeps a container, of landfall alone, that may: {ACCESS}");
    Finding::lack(WHAT, "not in use; containers of root's Docker are entered by root alone", hint)
}

#[cfg(test)]
mod tests {
    use super::super::State;
    use super::*;
    use crate::docker::helper_container::HelperFacts;

    fn described(helper: HelperFacts) -> Description {
        let mut description: Description = serde_json::from_str(r#"{"version": "v"}"#).unwrap();
        description.docker_helper = Some(helper);
        description
    }

    #[test]
    fn what_the_helper_is_given_is_told_before_and_after() {
        let before = finding(None, true);
        assert_eq!(before.state, State::Lack);
        let hint = before.hint.unwrap();
        assert!(hint.contains("CAP_SYS_ADMIN, CAP_SYS_PTRACE") && hint.contains("no network"), "{hint}");
        let running = HelperFacts { container: "h".to_owned(), state: HelperState::Running, reason: None };
        let after = finding(Some(&described(running.clone())), true);
        assert_eq!(after.state, State::Ok);
        assert!(after.detail.contains("CAP_SYS_ADMIN, CAP_SYS_PTRACE"), "{}", after.detail);
        let failed =
            HelperFacts { state: HelperState::Failed, reason: Some("no room".to_owned()), ..running };
        assert!(finding(Some(&described(failed)), true).detail.contains("no room"));
    }

    #[test]
    fn who_has_no_use_for_it_is_not_urged() {
        assert_eq!(finding(None, false).state, State::Ok);
    }
}
