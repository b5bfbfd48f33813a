//! What the verbs that ask the daemon share: where it is, what it says about itself, and what people are told when it
//! does not.

use std::ffi::OsString;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::exit::{Exit, Failure};
use crate::daemon::discovery::report::Found;
use crate::daemon::http::gateway::HttpFacts;
use crate::daemon::rpc::client::{CallError, Client, PATIENT_BUDGET};
use crate::daemon::rpc::ensure::{self, DesiredDaemon, EnsureError, Ensured};
use crate::docker::helper_container::HelperFacts;
use crate::error::chain;
use crate::model::forward_table::{ContainerState, EngineFacts};
use crate::model::grants::GrantFact;
use crate::model::native_sockets::Sockets;
use crate::model::registration::FoundBy;
use crate::registry::folder::Withheld;
use crate::sys::launcher::LauncherState;
use crate::sys::paths::{Home, HomeError};

/// What `describe` answers. A daemon may leave out what it does not know.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Description {
    /// Its build.
    pub version: String,
    /// Its process.
    #[serde(default)]
    pub pid: Option<u32>,
    /// Its home.
    #[serde(default)]
    pub home: Option<String>,
    /// Where its HTTP endpoint listens.
    #[serde(default)]
    pub http_port: Option<u16>,
    /// Whether containers reach it, and who holds the ports that it did not get.
    #[serde(default)]
    pub http: HttpFacts,
    /// Whether what is forwarded is served on the tailnet.
    #[serde(default)]
    pub tailscale: bool,
    /// How servers under `run` listen by default.
    #[serde(default)]
    pub sockets: Sockets,
    /// The container that enters others for it, where there is to be one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub docker_helper: Option<HelperFacts>,
    /// The process that keeps its capabilities, where root runs it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub launcher: Option<LauncherState>,
    /// Whether every container of Docker's is forwarded.
    #[serde(default)]
    pub all: bool,
    /// Whether the registrations of the last daemon are back.
    #[serde(default)]
    pub replayed: bool,
    /// The engine that it drives.
    #[serde(default)]
    pub engine: Option<EngineFacts>,
    /// Every registration, in the order in which they came.
    #[serde(default)]
    pub containers: Vec<Container>,
}

/// One registered container.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Container {
    /// Its folder.
    #[serde(default)]
    pub cwd: String,
    /// What makes the daemon forward it by itself, where it does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub found_by: Option<FoundBy>,
    /// The files of its folder that have no effect.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub withheld: Vec<Withheld>,
    /// What it may do beyond acting for itself, in force or not.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub grants: Vec<GrantFact>,
    /// How far it is reached, and its ports.
    #[serde(flatten)]
    pub state: ContainerState,
}

/// The home that the environment names.
pub fn home() -> Result<Home, Failure> {
    Home::from_environment().map_err(|error| no_home(&error))
}

/// A client of that home's daemon, whether it runs or not.
pub fn client() -> Result<Client, Failure> {
    Ok(Client::new(home()?.socket()))
}

/// A client of that home's daemon, which is started if none runs.
pub fn client_of_running() -> Result<Client, Failure> {
    let home = home()?;
    let client = Client::new(home.socket());
    ensured(home, Vec::new())?;
    Ok(client)
}

/// Sees to it that a daemon runs.
pub fn ensured(home: Home, arguments: Vec<OsString>) -> Result<Ensured, Failure> {
    let wanted = DesiredDaemon::own(home, arguments);
    ensure::ensure(&wanted).map_err(|error| not_ensured(&error, &wanted.home))
}

/// What the daemon says about itself; none if it is one that does not know how to.
pub fn describe(client: &Client) -> Result<Option<Description>, Failure> {
    match client.ask("describe") {
        Ok(answer) => read_description(answer).map(Some),
        // The reference answers something that is no answer; others say that they do not know the kind.
        Err(CallError::Refused(_) | CallError::Invalid) => Ok(None),
        Err(error) => Err(failed(&error)),
    }
}

/// The same, where without it there is nothing to tell.
pub fn described(client: &Client) -> Result<Description, Failure> {
    describe(client)?.ok_or_else(|| {
        Failure::new(Exit::Refused, "the daemon that runs is another program, and does not tell this")
            .hint("landfall status tells what it does tell; landfall up puts ours in its place")
    })
}

fn read_description(answer: Value) -> Result<Description, Failure> {
    serde_json::from_value(answer).map_err(|error| other_build(&error))
}

/// What people are told when the daemon's answer makes no sense.
pub fn other_build(error: &dyn std::fmt::Display) -> Failure {
    Failure::new(Exit::Failed, format!("the daemon describes itself in words of another build: {error}"))
        .hint("landfall up puts this build in its place")
}

/// Every container that Docker has, as the daemon sees it.
pub fn containers(client: &Client) -> Result<Vec<Found>, Failure> {
    #[derive(Deserialize)]
    struct Answer {
        containers: Vec<Found>,
    }
    let answer = client.within(PATIENT_BUDGET).ask("containers").map_err(|error| match error {
        CallError::Refused(reason) if reason.starts_with("Docker cannot be reached") => {
            Failure::new(Exit::Refused, reason).hint("landfall doctor says what there is to reach")
        }
        CallError::Refused(reason) if reason == "unknown request kind" => Failure::new(
            Exit::Refused,
            "the daemon that runs is another one, and does not look for containers",
        )
        .hint("landfall up puts ours in its place"),
        error => failed(&error),
    })?;
    serde_json::from_value::<Answer>(answer)
        .map(|answer| answer.containers)
        .map_err(|error| other_build(&error))
}

/// What people are told when the daemon was asked and did not do it.
pub fn failed(error: &CallError) -> Failure {
    let text = chain(error);
    match error {
        _ if error.is_absent() => {
            Failure::new(Exit::NoDaemon, "no daemon runs").hint("landfall up starts one")
        }
        CallError::Connect(cause) if cause.kind() == std::io::ErrorKind::PermissionDenied => {
            Failure::new(Exit::Denied, format!("cannot reach the daemon: {text}"))
                .hint("its home belongs to another user; LANDFALL_HOME names another one")
        }
        CallError::Stranger(_) => Failure::new(Exit::Denied, text)
            .hint("nothing was told to it; see who made the home's run directory"),
        CallError::Connect(_) => Failure::new(Exit::NoDaemon, format!("cannot reach the daemon: {text}")),
        CallError::Timeout(_) | CallError::Broken(_) | CallError::Ended => {
            Failure::new(Exit::NoDaemon, text).hint("landfall logs tells what the daemon last did")
        }
        CallError::Invalid => {
            Failure::new(Exit::Failed, text).hint("landfall up puts this build in its place")
        }
        CallError::Refused(reason) if reason.starts_with("not registered: ") => {
            Failure::new(Exit::Missing, text).hint("landfall ls shows what is registered")
        }
        CallError::Refused(_) => Failure::new(Exit::Refused, text),
    }
}

/// The failure of a name that nothing is registered under.
pub fn not_registered(name: &str) -> Failure {
    failed(&CallError::Refused(format!("not registered: {name}")))
}

fn not_ensured(error: &EnsureError, home: &Home) -> Failure {
    let failure = |exit| Failure::new(exit, chain(error));
    match error {
        EnsureError::Home(error) => no_home(error),
        EnsureError::NotYet => failure(Exit::NoDaemon).hint(format!(
            "try again in a moment; if the process in {} is not landfall, remove that file",
            home.pid_file().display()
        )),
        EnsureError::Exited => failure(Exit::NoDaemon)
            .hint(format!("the end of {} says why: landfall logs", home.daemon_log().display())),
        EnsureError::Drifted => failure(Exit::NoDaemon)
            .hint("a daemon of another build is still ending; try again when landfall status finds none"),
        EnsureError::Busy(_) => failure(Exit::NoDaemon).hint("try again in a moment"),
        EnsureError::Log(_) | EnsureError::Lock(_) | EnsureError::PidFile(_) => failure(Exit::NoDaemon)
            .hint(format!("{} must be writable; LANDFALL_HOME names another one", home.root().display())),
        EnsureError::Spawn(_) | EnsureError::NoHttpPort => failure(Exit::NoDaemon),
    }
}

/// For `sudo`, which may keep the HOME of the user.
pub(super) const ROOTS_HOME: &str =
    "set LANDFALL_HOME to a directory that only root may write to, such as /root/.landfall";

fn no_home(error: &HomeError) -> Failure {
    Failure::new(Exit::NoDaemon, chain(error)).hint(match error {
        HomeError::Unknown | HomeError::Relative(_) => "set LANDFALL_HOME to an absolute path",
        HomeError::TooLong(_) => "set LANDFALL_HOME to a shorter path",
        HomeError::Directory { .. } | HomeError::NotADirectory(_) => "LANDFALL_HOME names another place",
        HomeError::Owner { .. } | HomeError::Writable { .. } => ROOTS_HOME,
    })
}
