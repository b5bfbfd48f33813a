//! Whether the daemon's containers are entered by a helper, and whether that would be of use here.

use super::Finding;
use crate::cli::asking::{self, Description};
use crate::docker::helper::CAPABILITIES;
use crate::helper::{ACCESS, HelperState};
use crate::rpc::client::Client;

const WHAT: &str = "Docker helper";

/// What the daemon says of its helper; without one, whether somebody who is (not) root and who may (not) use Docker has a use
/// for it.
pub(super) fn helper(may_use_docker: bool) -> Finding {
    let description = crate::paths::Home::from_environment()
        .ok()
        .and_then(|home| asking::describe(&Client::new(home.socket())).ok().flatten());
    let is_root = rustix::process::geteuid().is_root();
    finding(description.as_ref(), is_root, may_use_docker)
}

fn finding(description: Option<&Description>, is_root: bool, may_use_docker: bool) -> Finding {
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
    if is_root {
        return Finding::ok(WHAT, "not needed: root enters containers itself");
    }
    if !may_use_docker {
        return Finding::ok(WHAT, "not in use; it takes access to Docker");
    }
    let hint = format!(
        "landfall up --docker-helper runs a container of landfall alone that may (CAP_{}): {ACCESS}. Not needed where Docker \
         runs without root",
        CAPABILITIES.join(", CAP_")
    );
    Finding::lack(WHAT, "not in use; containers of root's Docker are entered by root alone", hint)
}

#[cfg(test)]
mod tests {
    use super::super::State;
    use super::*;
    use crate::helper::HelperFacts;

    fn described(helper: HelperFacts) -> Description {
        let mut description: Description = serde_json::from_str(r#"{"version": "v"}"#).unwrap();
        description.docker_helper = Some(helper);
        description
    }

    #[test]
    fn what_the_helper_is_given_is_told_before_and_after() {
        let before = finding(None, false, true);
        assert_eq!(before.state, State::Lack);
        let hint = before.hint.unwrap();
        assert!(hint.contains("CAP_SYS_ADMIN, CAP_SYS_PTRACE") && hint.contains("no network"), "{hint}");
        let running = HelperFacts { container: "h".to_owned(), state: HelperState::Running, reason: None };
        let after = finding(Some(&described(running.clone())), false, true);
        assert_eq!(after.state, State::Ok);
        assert!(after.detail.contains("CAP_SYS_ADMIN, CAP_SYS_PTRACE"), "{}", after.detail);
        let failed =
            HelperFacts { state: HelperState::Failed, reason: Some("no room".to_owned()), ..running };
        assert!(finding(Some(&described(failed)), false, true).detail.contains("no room"));
    }

    #[test]
    fn who_has_no_use_for_it_is_not_urged() {
        assert_eq!(finding(None, true, true).state, State::Ok);
        assert_eq!(finding(None, false, false).state, State::Ok);
    }
}
