//! Functions that the verbs share to call the daemon: the client, the description that the daemon gives of itself, and
//! the failures of a call.

use std::ffi::OsString;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::exit::{Exit, Failure};
use crate::daemon::discovery::report::Found;
use crate::daemon::http::gateway::HttpFacts;
use crate::daemon::rpc::client::{CallError, Client, PATIENT_BUDGET};
use crate::daemon::rpc::ensure::{self, DesiredDaemon, EnsureError, Ensured};
use crate::daemon::rpc::request_handler::DescribedContainer;
use crate::docker::helper_container::HelperFacts;
use crate::error::chain;
use crate::model::forward_table::EngineFacts;
use crate::model::native_sockets::Sockets;
use crate::sys::launcher::LauncherState;
use crate::sys::paths::{Home, HomeError};

/// The answer to `describe`. A daemon may omit fields that it does not support.
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
    /// The port of its HTTP endpoint.
    #[serde(default)]
    pub http_port: Option<u16>,
    /// Whether containers reach that endpoint, and which processes hold the ports that it could not bind.
    #[serde(default)]
    pub http: HttpFacts,
    /// Whether forwarded ports are served on the tailnet.
    #[serde(default)]
    pub tailscale: bool,
    /// The default of `run --sockets`.
    #[serde(default)]
    pub sockets: Sockets,
    /// The helper container that enters other containers for it, if `--docker-helper` is set.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub docker_helper: Option<HelperFacts>,
    /// The process that keeps its capabilities, if root runs it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub launcher: Option<LauncherState>,
    /// Whether all Docker containers are forwarded.
    #[serde(default)]
    pub all: bool,
    /// Whether the registrations of the previous daemon are loaded.
    #[serde(default)]
    pub replayed: bool,
    /// The engine that it drives.
    #[serde(default)]
    pub engine: Option<EngineFacts>,
    /// All registrations, in order of registration.
    #[serde(default)]
    pub containers: Vec<DescribedContainer>,
}

/// Returns the home that the environment names.
pub fn home() -> Result<Home, Failure> {
    Home::from_environment().map_err(|error| home_failure(&error))
}

/// Returns a client of that home's daemon, whether it runs or not.
pub fn client() -> Result<Client, Failure> {
    Ok(Client::new(home()?.socket()))
}

/// Returns a client of that home's daemon, and starts the daemon if it does not run.
pub fn client_of_running() -> Result<Client, Failure> {
    let home = home()?;
    let client = Client::new(home.socket());
    ensure_daemon(home, Vec::new())?;
    Ok(client)
}

/// Starts a daemon unless one runs.
pub fn ensure_daemon(home: Home, arguments: Vec<OsString>) -> Result<Ensured, Failure> {
    let wanted = DesiredDaemon::own(home, arguments);
    ensure::ensure(&wanted).map_err(|error| ensure_failure(&error, &wanted.home))
}

/// Returns the daemon's description; `None` if the daemon does not support `describe`.
pub fn describe(client: &Client) -> Result<Option<Description>, Failure> {
    match client.ask("describe") {
        Ok(answer) => read_description(answer).map(Some),
        // The reference implementation sends an answer without `ok`; other daemons refuse the unknown kind.
        Err(CallError::Refused(_) | CallError::Invalid) => Ok(None),
        Err(error) => Err(call_failure(&error)),
    }
}

/// Returns the daemon's description, or a failure if the daemon does not support `describe`.
pub fn require_description(client: &Client) -> Result<Description, Failure> {
    describe(client)?.ok_or_else(|| {
        Failure::new(Exit::Refused, "another program runs as the daemon, and does not describe itself")
            .hint("landfall status shows what it reports; landfall up replaces it with this build")
    })
}

fn read_description(answer: Value) -> Result<Description, Failure> {
    serde_json::from_value(answer).map_err(|error| description_failure(&error))
}

/// Returns the failure for an answer of the daemon that cannot be parsed.
pub fn description_failure(error: &dyn std::fmt::Display) -> Failure {
    Failure::new(Exit::Failed, format!("the daemon's answer has the format of another build: {error}"))
        .hint("landfall up replaces the daemon with this build")
}

/// Returns all Docker containers, as the daemon sees them.
pub fn containers(client: &Client) -> Result<Vec<Found>, Failure> {
    #[derive(Deserialize)]
    struct Answer {
        containers: Vec<Found>,
    }
    let answer = client.within(PATIENT_BUDGET).ask("containers").map_err(|error| match error {
        CallError::Refused(reason) if reason.starts_with("Docker cannot be reached") => {
            Failure::new(Exit::Refused, reason).hint("landfall doctor checks access to Docker")
        }
        CallError::Refused(reason) if reason == "unknown request kind" => Failure::new(
            Exit::Refused,
            "the running daemon is another build, and does not list Docker containers",
        )
        .hint("landfall up replaces it with this build"),
        error => call_failure(&error),
    })?;
    serde_json::from_value::<Answer>(answer)
        .map(|answer| answer.containers)
        .map_err(|error| description_failure(&error))
}

/// Converts the error of a call to the daemon to a failure.
pub fn call_failure(error: &CallError) -> Failure {
    let text = chain(error);
    match error {
        _ if error.is_absent() => {
            Failure::new(Exit::NoDaemon, "no daemon runs").hint("landfall up starts one")
        }
        CallError::Connect(cause) if cause.kind() == std::io::ErrorKind::PermissionDenied => {
            Failure::new(Exit::Denied, format!("cannot reach the daemon: {text}"))
                .hint("its home belongs to another user; set LANDFALL_HOME to a directory of yours")
        }
        CallError::ForeignSocket(_) => Failure::new(Exit::Denied, text)
            .hint("no request was sent to it; check who owns the run directory of the home"),
        CallError::Connect(_) => Failure::new(Exit::NoDaemon, format!("cannot reach the daemon: {text}")),
        CallError::Timeout(_) | CallError::Broken(_) | CallError::Ended => {
            Failure::new(Exit::NoDaemon, text).hint("landfall logs shows what the daemon did last")
        }
        CallError::Invalid => {
            Failure::new(Exit::Failed, text).hint("landfall up replaces the daemon with this build")
        }
        CallError::Refused(reason) if reason.starts_with("not registered: ") => {
            Failure::new(Exit::Missing, text).hint("landfall ls shows what is registered")
        }
        CallError::Refused(_) => Failure::new(Exit::Refused, text),
    }
}

/// Returns the failure for a name that is not registered.
pub fn not_registered(name: &str) -> Failure {
    call_failure(&CallError::Refused(format!("not registered: {name}")))
}

fn ensure_failure(error: &EnsureError, home: &Home) -> Failure {
    let failure = |exit| Failure::new(exit, chain(error));
    match error {
        EnsureError::Home(error) => home_failure(error),
        EnsureError::NotYet => failure(Exit::NoDaemon).hint(format!(
            "try again in a few seconds; if the process in {} is not landfall, remove that file",
            home.pid_file().display()
        )),
        EnsureError::Exited => failure(Exit::NoDaemon)
            .hint(format!("the end of {} shows the reason; run landfall logs", home.daemon_log().display())),
        EnsureError::Drifted => failure(Exit::NoDaemon)
            .hint("a daemon of another build is still stopping; try again when landfall status reports that no daemon runs"),
        EnsureError::Busy(_) => failure(Exit::NoDaemon).hint("try again in a few seconds"),
        EnsureError::Log(_) | EnsureError::Lock(_) | EnsureError::PidFile(_) => failure(Exit::NoDaemon)
            .hint(format!("{} must be writable; LANDFALL_HOME selects another directory", home.root().display())),
        EnsureError::Spawn(_) | EnsureError::NoHttpPort => failure(Exit::NoDaemon),
    }
}

/// The hint for `sudo`, which may keep the HOME of the user.
pub(super) const ROOT_HOME_HINT: &str = "set LANDFALL_HOME to a directory that only root may write to";

fn home_failure(error: &HomeError) -> Failure {
    Failure::new(Exit::NoDaemon, chain(error)).hint(match error {
        HomeError::Unknown | HomeError::Relative(_) => "set LANDFALL_HOME to an absolute path",
        HomeError::TooLong(_) => "set LANDFALL_HOME to a shorter path",
        HomeError::Directory { .. } | HomeError::NotADirectory(_) => "set LANDFALL_HOME to another directory",
        HomeError::Owner { .. } | HomeError::Writable { .. } => ROOT_HOME_HINT,
    })
}
