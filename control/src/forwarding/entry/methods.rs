//! The methods to enter a located container, fastest first. The first one that works is used; the failures of faster
//! ones are kept as the reason.

use std::path::PathBuf;

use landfall_engine::command::UpstreamKind;
use landfall_engine::opener::FailureKind;
use landfall_engine::opener::client::{OpenError, Opener, Target};

use super::{Certainty, EntryResult};
use crate::model::registration::AttachMethod;
use crate::sys::directory_access::{self, DirectoryAccessError};
use crate::sys::launcher;

/// One method.
pub(super) enum EntryMethod {
    /// An opener of this process, which enters the target.
    Target(Target),
    /// The agent whose socket is in this directory.
    Agent(PathBuf),
    /// An opener that the helper starts; the helper listens at this socket.
    Helper(PathBuf, Target),
}

/// The method by which a container was entered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::forwarding) enum EnteredBy {
    /// An opener of this process.
    Opener,
    /// The agent in this directory.
    Agent(PathBuf),
    /// An opener that the helper started.
    Helper,
}

impl EnteredBy {
    /// The text of an attach method, with the method of entry where the attach method allows several.
    pub(in crate::forwarding) fn describe(&self, attach_method: &AttachMethod) -> String {
        match (attach_method, self) {
            (AttachMethod::Docker { .. }, EnteredBy::Agent(directory)) => {
                format!("{attach_method}, agent in {}", directory.display())
            }
            (AttachMethod::Docker { .. }, EnteredBy::Helper) => format!("{attach_method}, helper"),
            _ => attach_method.to_string(),
        }
    }
}

impl EntryMethod {
    fn entered_by(&self) -> EnteredBy {
        match self {
            EntryMethod::Target(_) => EnteredBy::Opener,
            EntryMethod::Agent(directory) => EnteredBy::Agent(directory.clone()),
            EntryMethod::Helper(..) => EnteredBy::Helper,
        }
    }

    /// Enters, and returns what an engine with this number of shards needs.
    fn open(self, shards: u16) -> Result<EntryResult, OpenError> {
        let entered_by = self.entered_by();
        let (opener, sources, descriptors, kind) = match self {
            EntryMethod::Target(target) => {
                let mut opener = launcher::opener(target)?;
                let (sources, descriptors) = opener.upstream(shards)?;
                (opener, sources, descriptors, UpstreamKind::Opener)
            }
            EntryMethod::Helper(socket, target) => {
                let mut opener = Opener::spawn_by_helper(&socket, target)?;
                let (sources, descriptors) = opener.upstream(shards)?;
                (opener, sources, descriptors, UpstreamKind::Opener)
            }
            EntryMethod::Agent(directory) => {
                let mut opener = Opener::connect(&directory)?;
                let (sources, descriptors) = opener.agent_upstream()?;
                (opener, sources, descriptors, UpstreamKind::Agent)
            }
        };
        Ok(EntryResult {
            cookie: opener.netns_cookie(),
            sources,
            kind,
            descriptors,
            entered_by,
            fallback_reason: None,
        })
    }
}

/// Enters by the first of these methods that works. Blocks for some milliseconds, with an agent for seconds. `advice`
/// is the hint for a failure for lack of permission.
pub(super) fn enter(
    entry_methods: Vec<EntryMethod>,
    advice: Option<&str>,
    shards: u16,
) -> Result<EntryResult, (Certainty, String)> {
    let mut failed: Option<(Certainty, String)> = None;
    for method in entry_methods {
        if let EntryMethod::Agent(directory) = &method
            && let Err(error) = directory_access::check(directory)
            // For an unreadable directory, the agent's own error is more precise.
            && !matches!(error, DirectoryAccessError::Unreadable { .. })
        {
            failed = Some(and_also(failed, Certainty::Refused, error.to_string()));
            continue;
        }
        match method.open(shards) {
            // Only the opener of this process is faster, and the helper's opener works the same way, so no reason is
            // kept.
            Ok(entry) if entry.entered_by == EnteredBy::Helper => return Ok(entry),
            Ok(entry) => {
                return Ok(EntryResult { fallback_reason: failed.map(|(_, reason)| reason), ..entry });
            }
            Err(error) => {
                let (certainty, mut reason) = certainty_of(&error);
                if let (Some(FailureKind::NotPermitted), Some(advice)) = (error.kind(), advice) {
                    reason = format!("{reason} ({advice})");
                }
                // No other method can enter a container that is gone or that is in this process's own namespace.
                let final_word = matches!(error.kind(), Some(FailureKind::Gone | FailureKind::OwnNamespace));
                if failed.is_none() && final_word {
                    return Err((certainty, reason));
                }
                failed = Some(and_also(failed, certainty, reason));
            }
        }
    }
    Err(failed.unwrap_or((Certainty::Unknown, "no method to enter it is available".to_owned())))
}

/// Appends another reason. The first method is the one that users expect, so its certainty is kept.
fn and_also(
    failed: Option<(Certainty, String)>,
    certainty: Certainty,
    reason: String,
) -> (Certainty, String) {
    match failed {
        None => (certainty, reason),
        Some((certainty, first)) => (certainty, format!("{first}; {reason}")),
    }
}

/// Derives the certainty and the reason from a failure.
fn certainty_of(error: &OpenError) -> (Certainty, String) {
    let certainty = match error.kind() {
        Some(FailureKind::Gone) => Certainty::Gone,
        Some(
            FailureKind::NotPermitted
            | FailureKind::OwnNamespace
            | FailureKind::Unsupported
            | FailureKind::InUse
            | FailureKind::Other,
        ) => Certainty::Refused,
        // An agent that answers wrongly is running.
        None if matches!(error, OpenError::Agent { .. }) => Certainty::Refused,
        Some(FailureKind::Exhausted) | None => Certainty::Unknown,
    };
    let reason = match error.kind() {
        Some(FailureKind::OwnNamespace) => {
            "it shares the daemon's own network, so its ports answer on the host already".to_owned()
        }
        _ => error.to_string(),
    };
    (certainty, reason)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn attach_method(container: Option<&str>) -> AttachMethod {
        let container = container.map(|name| crate::model::registration::ContainerName::new(name).unwrap());
        AttachMethod::Docker { container }
    }

    #[test]
    fn docker_attach_method_text_names_the_method_of_entry() {
        let agent = EnteredBy::Agent("/home/u/shared".into());
        assert_eq!(EnteredBy::Opener.describe(&attach_method(None)), "docker");
        assert_eq!(agent.describe(&attach_method(None)), "docker, agent in /home/u/shared");
        assert_eq!(
            agent.describe(&attach_method(Some("shop-1"))),
            "docker (shop-1), agent in /home/u/shared"
        );
        assert_eq!(EnteredBy::Helper.describe(&attach_method(Some("shop-1"))), "docker (shop-1), helper");
        let own = AttachMethod::Agent { directory: "/d".into() };
        assert_eq!(EnteredBy::Agent("/d".into()).describe(&own), "agent in /d");
    }

    #[test]
    fn failed_entry_has_every_reason_and_the_certainty_of_the_first() {
        let closed = std::os::unix::fs::PermissionsExt::from_mode(0o700);
        let nowhere = tempfile::Builder::new().permissions(closed).tempdir().unwrap();
        let missing = nowhere.path().join("missing");
        let (certainty, reason) =
            enter(vec![EntryMethod::Agent(nowhere.path().to_owned()), EntryMethod::Agent(missing)], None, 1)
                .unwrap_err();
        assert_eq!(certainty, Certainty::Gone, "{reason}");
        assert!(reason.contains("no agent has created its socket"), "{reason}");
        let process = Target::process(std::process::id()).unwrap();
        let helper = EntryMethod::Helper(nowhere.path().join("opener.sock"), process);
        let (certainty, reason) = enter(vec![helper], None, 1).unwrap_err();
        assert_eq!(certainty, Certainty::Unknown, "{reason}");
        let (certainty, _) = enter(Vec::new(), None, 1).unwrap_err();
        assert_eq!(certainty, Certainty::Unknown);
    }
}
