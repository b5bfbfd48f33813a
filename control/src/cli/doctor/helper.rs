//! The finding about the daemon's helper container: its state, or whether this user would need one.

use super::Finding;
use crate::cli::daemon_client::{self, Description};
use crate::daemon::rpc::client::Client;
use crate::docker::helper_container::{ACCESS, HelperState};

const WHAT: &str = "Docker helper";

/// Returns the state of the daemon's helper. Without a helper, the finding depends on `is_useful`: this user can use
/// Docker, but cannot enter its containers.
pub(super) fn helper(is_useful: bool) -> Finding {
    let description = crate::sys::paths::Home::from_environment()
        .ok()
        .and_then(|home| daemon_client::describe(&Client::new(home.socket())).ok().flatten());
    finding(description.as_ref(), is_useful)
}

fn finding(description: Option<&Description>, is_useful: bool) -> Finding {
    if let Some(helper) = description.and_then(|description| description.docker_helper.as_ref()) {
        let name = &helper.container;
        return match (helper.state, &helper.reason) {
            (HelperState::Running, _) => Finding::ok(WHAT, format!("{name} runs; {ACCESS}")),
            (HelperState::Starting, _) => Finding::ok(WHAT, format!("{name} is starting")),
            (HelperState::Failed, reason) => {
                let reason = reason.as_deref().unwrap_or("unknown reason");
                let hint = "the daemon retries automatically; to run without a helper: landfall down, then landfall up without --docker-helper";
                Finding::lack(WHAT, format!("{name} is unavailable: {reason}"), hint)
            }
        };
    }
    if !is_useful {
        return Finding::ok(WHAT, "not in use, and not needed by this user");
    }
    let hint = format!("landfall up --docker-helper runs a helper container of landfall: {ACCESS}");
    Finding::lack(WHAT, "not in use; only root can enter containers of root's Docker", hint)
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
    fn the_access_of_the_helper_is_shown_before_and_after_its_start() {
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
    fn a_user_who_needs_no_helper_gets_no_hint() {
        assert_eq!(finding(None, false).state, State::Ok);
    }
}
