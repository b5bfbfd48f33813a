//! The ways into a container that was found, fastest first. The first that works is used; why no faster one did is kept.

use std::path::PathBuf;

use landfall_engine::command::UpstreamKind;
use landfall_engine::opener::FailureKind;
use landfall_engine::opener::client::{OpenError, Opener, Target};

use super::{Certainty, EntryResult};
use crate::model::registration::AttachMethod;
use crate::sys::directory_access::{self, DirectoryAccessError};
use crate::sys::launcher;

/// One way in.
pub(super) enum EntryMethod {
    /// By an opener that goes there.
    Target(Target),
    /// By an agent whose socket is in this directory.
    Agent(PathBuf),
    /// By an opener that the helper starts, which listens at this socket.
    Helper(PathBuf, Target),
}

/// What a container was entered by.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::forwarding) enum Means {
    /// An opener of our own.
    Opener,
    /// The agent in this directory.
    Agent(PathBuf),
    /// An opener of the helper's.
    Helper,
}

impl Means {
    /// The way of a container with what it was entered by, where the way leaves that open.
    pub(in crate::forwarding) fn words(&self, attach_method: &AttachMethod) -> String {
        match (attach_method, self) {
            (AttachMethod::Docker { .. }, Means::Agent(directory)) => {
                format!("{attach_method}, agent in {}", directory.display())
            }
            (AttachMethod::Docker { .. }, Means::Helper) => format!("{attach_method}, helper"),
            _ => attach_method.to_string(),
        }
    }
}

impl EntryMethod {
    fn means(&self) -> Means {
        match self {
            EntryMethod::Target(_) => Means::Opener,
            EntryMethod::Agent(directory) => Means::Agent(directory.clone()),
            EntryMethod::Helper(..) => Means::Helper,
        }
    }

    /// Goes through, and brings what an engine with so many shards needs.
    fn open(self, shards: u16) -> Result<EntryResult, OpenError> {
        let means = self.means();
        let (opener, sources, descriptors, kind) = match self {
            EntryMethod::Target(target) => {
                let mut opener = launcher::opener(target)?;
                let (sources, descriptors) = opener.upstream(shards)?;
                (opener, sources, descriptors, UpstreamKind::Opener)
            }
            EntryMethod::Helper(socket, target) => {
                let mut opener = Opener::through(&socket, target)?;
                let (sources, descriptors) = opener.upstream(shards)?;
                (opener, sources, descriptors, UpstreamKind::Opener)
            }
            EntryMethod::Agent(directory) => {
                let mut opener = Opener::connect(&directory)?;
                let (sources, descriptors) = opener.agent_upstream()?;
                (opener, sources, descriptors, UpstreamKind::Agent)
            }
        };
        Ok(EntryResult { cookie: opener.netns_cookie(), sources, kind, descriptors, means, faster: None })
    }
}

/// Enters by the first of these doors that opens. Blocks for some milliseconds, and on an agent for seconds. `advice` is what would
/// help whoever is not permitted to.
pub(super) fn enter(
    doors: Vec<EntryMethod>,
    advice: Option<&str>,
    shards: u16,
) -> Result<EntryResult, (Certainty, String)> {
    let mut missed: Option<(Certainty, String)> = None;
    for door in doors {
        if let EntryMethod::Agent(directory) = &door
            && let Err(error) = directory_access::check(directory)
            // The agent says more about a directory that is missing.
            && !matches!(error, DirectoryAccessError::Unreadable { .. })
        {
            missed = Some(and_also(missed, Certainty::Refused, error.to_string()));
            continue;
        }
        match door.open(shards) {
            // Nothing is faster than a helper's opener, which is like our own.
            Ok(entry) if entry.means == Means::Helper => return Ok(entry),
            Ok(entry) => return Ok(EntryResult { faster: missed.map(|(_, reason)| reason), ..entry }),
            Err(error) => {
                let (certainty, mut reason) = failed(&error);
                if let (Some(FailureKind::NotPermitted), Some(advice)) = (error.kind(), advice) {
                    reason = format!("{reason} ({advice})");
                }
                // No other door leads further into a container that is gone, or that is where we are.
                let final_word = matches!(error.kind(), Some(FailureKind::Gone | FailureKind::OwnNamespace));
                if missed.is_none() && final_word {
                    return Err((certainty, reason));
                }
                missed = Some(and_also(missed, certainty, reason));
            }
        }
    }
    Err(missed.unwrap_or((Certainty::Unknown, "there is no way in".to_owned())))
}

/// Adds one more reason. Users expect the first method to be used, so its certainty counts.
fn and_also(
    missed: Option<(Certainty, String)>,
    certainty: Certainty,
    reason: String,
) -> (Certainty, String) {
    match missed {
        None => (certainty, reason),
        Some((certainty, first)) => (certainty, format!("{first}; {reason}")),
    }
}

/// What a failure says of the container.
fn failed(error: &OpenError) -> (Certainty, String) {
    let certainty = match error.kind() {
        Some(FailureKind::Gone) => Certainty::Gone,
        Some(
            FailureKind::NotPermitted
            | FailureKind::OwnNamespace
            | FailureKind::Unsupported
            | FailureKind::InUse
            | FailureKind::Other,
        ) => Certainty::Refused,
        // An agent that does not answer as it should runs all the same.
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
    fn a_way_by_docker_is_told_with_what_it_was_entered_by() {
        let agent = Means::Agent("/home/u/shared".into());
        assert_eq!(Means::Opener.words(&attach_method(None)), "docker");
        assert_eq!(agent.words(&attach_method(None)), "docker, agent in /home/u/shared");
        assert_eq!(agent.words(&attach_method(Some("shop-1"))), "docker (shop-1), agent in /home/u/shared");
        assert_eq!(Means::Helper.words(&attach_method(Some("shop-1"))), "docker (shop-1), helper");
        let own = AttachMethod::Agent { directory: "/d".into() };
        assert_eq!(Means::Agent("/d".into()).words(&own), "agent in /d");
    }

    #[test]
    fn without_any_way_in_every_reason_is_told_and_the_first_one_counts() {
        let closed = std::os::unix::fs::PermissionsExt::from_mode(0o700);
        let nowhere = tempfile::Builder::new().permissions(closed).tempdir().unwrap();
        let missing = nowhere.path().join("missing");
        let (certainty, reason) =
            enter(vec![EntryMethod::Agent(nowhere.path().to_owned()), EntryMethod::Agent(missing)], None, 1)
                .unwrap_err();
        assert_eq!(certainty, Certainty::Gone, "{reason}");
        assert!(reason.contains("no agent has made its socket"), "{reason}");
        let process = Target::process(std::process::id()).unwrap();
        let helper = EntryMethod::Helper(nowhere.path().join("opener.sock"), process);
        let (certainty, reason) = enter(vec![helper], None, 1).unwrap_err();
        assert_eq!(certainty, Certainty::Unknown, "{reason}");
        let (certainty, _) = enter(Vec::new(), None, 1).unwrap_err();
        assert_eq!(certainty, Certainty::Unknown);
    }
}
