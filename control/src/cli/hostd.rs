//! `landfall _hostd`: runs the daemon in this process.

use std::io::IsTerminal;
use std::num::NonZeroU32;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::time::Duration;

use jiff::SignedDuration;

use super::args::{DaemonArgs, LauncherArgs};
use super::exit::{Exit, Failure};
use crate::broker::message::Extensions;
use crate::cli::daemon_client::ROOT_HOME_HINT;
use crate::daemon::tailscale::CALL_TIMEOUT;
use crate::daemon::{self, Options, StartError};
use crate::docker::CONTEXT_BYTES_MAX;
use crate::error::chain;
use crate::model::port_policy;
use crate::sys::launcher::split;
use crate::sys::paths::{Home, HomeError};
use crate::sys::token_variables;

/// The interval between checks whether containers still exist; a duration such as `30s`.
const GC_INTERVAL: &str = "LANDFALL_GC_INTERVAL";
/// The number of consecutive checks that have to miss a container before it is deregistered.
const GC_MISSES: &str = "LANDFALL_GC_MISSES";
/// The time limit of one step of a teardown; a duration such as `60s`.
const CLEANUP_TIMEOUT: &str = "LANDFALL_CLEANUP_TIMEOUT";
/// The time limit of one call of tailscale; a duration such as `30s`.
const TAILSCALE_TIMEOUT: &str = "LANDFALL_TAILSCALE_TIMEOUT";

/// The extensions of the broker protocol that are offered to containers: `all`, or `none`, for comparison and for a
/// peer that fails when extensions are offered.
const BROKER_EXTENSIONS: &str = "LANDFALL_BROKER_EXTENSIONS";

/// Runs the daemon until it is asked to stop.
pub fn hostd(args: DaemonArgs) -> Result<Exit, Failure> {
    if token_variables::are_set() {
        return Err(exec_without_tokens());
    }
    let options = options(args, |name| std::env::var(name).ok())?;
    // Leave the session of the terminal, whose hangup would end the daemon, unless a user runs it on a terminal. The
    // call fails if this process already leads a session or a process group; the error is ignored.
    if !std::io::stdin().is_terminal() {
        let _ = rustix::process::setsid();
    }
    options.home.ensure_directories().map_err(|error| start_failure(&error.into()))?;
    // Must happen while the process has one thread.
    split(&options.home).map_err(|error| {
        Failure::new(Exit::Failed, format!("the daemon cannot give up its privileges: {}", chain(&error)))
    })?;
    let runtime = super::runtime()?;
    let done = runtime.block_on(daemon::run(options));
    // Blocking tasks are not awaited: all work that has to finish is done.
    runtime.shutdown_background();
    done.map(|()| Exit::Ok).map_err(|error| start_failure(&error))
}

/// Keeps the capabilities of the daemon that started it, for as long as that daemon runs.
pub fn launcher(args: &LauncherArgs) -> Result<Exit, Failure> {
    let failed = |error: &dyn std::error::Error| Failure::new(Exit::Failed, chain(error));
    let home = Home::at(args.home.clone()).map_err(|error| failed(&error))?;
    daemon::launcher::main(&home).map(|()| Exit::Ok).map_err(|error| failed(&error))
}

/// Executes this program again with the same arguments and without tokens in its environment. Returns only if that
/// fails.
fn exec_without_tokens() -> Failure {
    let mut command = Command::new("/proc/self/exe");
    command.arg0("landfall").args(std::env::args_os().skip(1));
    let error = token_variables::remove_from(&mut command).exec();
    Failure::new(Exit::Failed, format!("cannot remove tokens from the environment: {}", chain(&error)))
}

fn options(args: DaemonArgs, variable: impl Fn(&str) -> Option<String>) -> Result<Options, Failure> {
    let home = Home::from_environment().map_err(|error| {
        Failure::new(Exit::Failed, chain(&error))
            .hint("set LANDFALL_HOME to a directory for the daemon's files")
    })?;
    let set = |name| variable(name).filter(|value| !value.is_empty());
    Ok(Options {
        home,
        http_port: args.http_port.unwrap_or(port_policy::HTTP_PORT),
        http_bind: args.http_bind,
        restart: !args.no_restart,
        discover_all: args.all,
        tailscale: args.tailscale,
        docker_helper: args.docker_helper,
        sockets: args.sockets.unwrap_or_default(),
        build_context_bytes_max: args.build_context_max.map_or(CONTEXT_BYTES_MAX, |size| size.0),
        tailscale_timeout: duration(TAILSCALE_TIMEOUT, set(TAILSCALE_TIMEOUT), CALL_TIMEOUT)?,
        gc_interval: duration(GC_INTERVAL, set(GC_INTERVAL), Duration::from_secs(30))?,
        gc_misses: misses(set(GC_MISSES))?,
        cleanup_timeout: duration(CLEANUP_TIMEOUT, set(CLEANUP_TIMEOUT), Duration::from_secs(60))?,
        broker_extensions: extensions(set(BROKER_EXTENSIONS))?,
    })
}

fn duration(name: &str, value: Option<String>, default: Duration) -> Result<Duration, Failure> {
    let Some(value) = value else { return Ok(default) };
    let parsed =
        value.trim().parse::<SignedDuration>().ok().and_then(|length| Duration::try_from(length).ok());
    parsed.filter(|length| !length.is_zero()).ok_or_else(|| {
        Failure::new(Exit::Usage, format!("{name} is \"{value}\", which is not a duration"))
            .hint("give a duration such as 30s, 500ms or 2m")
    })
}

fn misses(value: Option<String>) -> Result<u32, Failure> {
    let Some(value) = value else { return Ok(3) };
    value.trim().parse::<NonZeroU32>().map(NonZeroU32::get).map_err(|_| {
        Failure::new(Exit::Usage, format!("{GC_MISSES} is \"{value}\", which is not a count"))
            .hint("give a number from 1")
    })
}

fn extensions(value: Option<String>) -> Result<Extensions, Failure> {
    match value.as_deref().map(str::trim) {
        None | Some("all") => Ok(Extensions::ALL),
        Some("none") => Ok(Extensions::NONE),
        Some(value) => {
            let text = format!("{BROKER_EXTENSIONS} is \"{value}\", which is neither all nor none");
            Err(Failure::new(Exit::Usage, text).hint("set it to all or none"))
        }
    }
}

fn start_failure(error: &StartError) -> Failure {
    let failure = Failure::new(Exit::Failed, chain(error));
    match error {
        StartError::Claim(daemon::ClaimError::Taken(_)) => {
            failure.hint("each home has one daemon; set LANDFALL_HOME to another home")
        }
        StartError::Http(_) => {
            failure.hint("--http-bind needs an address of this machine; --http-port 0 picks a free port")
        }
        StartError::Home(HomeError::Owner { .. } | HomeError::Writable { .. }) => {
            failure.hint(ROOT_HOME_HINT)
        }
        StartError::Home(_) | StartError::Claim(_) | StartError::File { .. } | StartError::Signals(_) => {
            failure
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(value: &str) -> Result<Duration, String> {
        let default = Duration::from_secs(30);
        duration(GC_INTERVAL, Some(value.to_owned()), default).map_err(|failure| failure.message)
    }

    #[test]
    fn durations_have_units() {
        assert_eq!(parsed("20ms"), Ok(Duration::from_millis(20)));
        assert_eq!(parsed(" 60s "), Ok(Duration::from_secs(60)));
        assert_eq!(parsed("2m"), Ok(Duration::from_secs(120)));
        for wrong in ["-1s", "0s", "soon", "30"] {
            let expected = format!("LANDFALL_GC_INTERVAL is \"{wrong}\", which is not a duration");
            assert_eq!(parsed(wrong), Err(expected));
        }
        assert_eq!(duration(GC_INTERVAL, None, Duration::from_secs(30)), Ok(Duration::from_secs(30)));
    }

    #[test]
    fn extensions_are_all_or_none() {
        assert_eq!(extensions(None), Ok(Extensions::ALL));
        assert_eq!(extensions(Some("none".to_owned())), Ok(Extensions::NONE));
        let wrong = extensions(Some("binary".to_owned())).unwrap_err().message;
        assert_eq!(wrong, "LANDFALL_BROKER_EXTENSIONS is \"binary\", which is neither all nor none");
    }

    #[test]
    fn a_miss_count_is_at_least_one() {
        assert_eq!(misses(None), Ok(3));
        assert_eq!(misses(Some("1".to_owned())), Ok(1));
        assert!(misses(Some("0".to_owned())).is_err());
        assert!(misses(Some("many".to_owned())).is_err());
    }
}
