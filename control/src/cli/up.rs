//! `landfall up`: ensures that one daemon of this build runs.

use std::os::unix::process::CommandExt;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::json;

use super::args::UpArgs;
use super::exit::{Exit, Failure};
use super::trust;
use crate::cli::daemon_client::{self, Description};
use crate::cli::ui::output::{Colour, Printer, Report};
use crate::daemon::http::gateway::{Gateway, HttpFacts};
use crate::daemon::rpc::client::Client;
use crate::daemon::rpc::ensure::{DesiredDaemon, Ensured};
use crate::docker::helper_container::program::Program;
use crate::docker::helper_container::{ACCESS, HelperFacts, HelperState};
use crate::error::chain;
use crate::model::forward_table::EngineFacts;
use crate::model::port_policy;
use crate::sys::token_variables;
use crate::version;

/// The maximum wait for a helper that is starting; the first start copies its image to the Docker engine.
const HELPER_MAX: Duration = Duration::from_secs(30);
/// The maximum wait for the daemon to load the registrations of its predecessor, which shows the folders without an
/// approval. It takes milliseconds, unless Docker is slow to answer.
const REPLAY_MAX: Duration = Duration::from_secs(2);
/// The interval between requests while waiting.
const POLL: Duration = Duration::from_millis(20);

/// Starts the daemon, finds a running one, or replaces one of another build.
pub fn up(args: &UpArgs) -> Result<Exit, Failure> {
    let home = daemon_client::home()?;
    let client = Client::new(home.socket());
    if args.foreground {
        return become_daemon(args, &client);
    }
    if args.daemon.docker_helper {
        // The daemon is the same program, and would report this error only in its log.
        Program::own().map_err(|error| Failure::new(Exit::Refused, chain(&error)).hint(error.hint()))?;
    }
    let ensured = daemon_client::ensure_daemon(home, args.daemon.words())?;
    let description = wait_until_ready(&client)?;
    let printer = Printer::to_stdout(args.json);
    if args.json {
        printer.print(&to_json(&ensured, description.as_ref()).to_string());
    } else {
        to_text(printer, &ensured, description.as_ref());
    }
    warn_about_ignored_options(args, &ensured, description.as_ref());
    Ok(Exit::Ok)
}

/// Returns the daemon's description after its helper runs or has failed and the registrations of its predecessor are
/// loaded, or after the maximum waits.
fn wait_until_ready(client: &Client) -> Result<Option<Description>, Failure> {
    let start = Instant::now();
    loop {
        let description = daemon_client::describe(client)?;
        let helper = description.as_ref().and_then(|description| description.docker_helper.as_ref());
        let starts = helper.is_some_and(|helper| helper.state == HelperState::Starting);
        let replays = description.as_ref().is_some_and(|description| !description.replayed);
        let waited = start.elapsed();
        if !(starts && waited < HELPER_MAX || replays && waited < REPLAY_MAX) {
            return Ok(description);
        }
        thread::sleep(POLL);
    }
}

fn become_daemon(args: &UpArgs, client: &Client) -> Result<Exit, Failure> {
    if client.is_reachable() {
        return Err(Failure::new(Exit::Refused, "a daemon is already running").hint("landfall down stops it"));
    }
    let wanted = DesiredDaemon::own(daemon_client::home()?, args.daemon.words());
    let mut command = Command::new(&wanted.program);
    command.arg0("landfall").arg("_hostd").args(&wanted.arguments);
    let error = token_variables::remove_from(&mut command).exec();
    Err(Failure::new(Exit::Failed, format!("cannot execute the daemon: {}", chain(&error))))
}

/// Returns the outcome as one word.
fn outcome(ensured: &Ensured) -> &'static str {
    match (ensured.spawned, ensured.respawned) {
        (_, true) => "upgraded",
        (true, false) => "started",
        (false, false) => "reused",
    }
}

fn pid(ensured: &Ensured, description: Option<&Description>) -> Option<u32> {
    description.and_then(|description| description.pid).or(ensured.pid)
}

fn to_json(ensured: &Ensured, description: Option<&Description>) -> serde_json::Value {
    json!({
        "outcome": outcome(ensured),
        "pid": pid(ensured, description),
        "httpPort": ensured.http_port,
        "version": description.map_or_else(version::current, |description| description.version.clone()),
        "http": description.map(|description| &description.http),
        "engine": description.and_then(|description| description.engine.as_ref()),
        "dockerHelper": description.and_then(|description| description.docker_helper.as_ref()),
        "withheld": description.map(|description| trust::withheld(&description.containers)).unwrap_or_default(),
    })
}

fn to_text(printer: Printer, ensured: &Ensured, description: Option<&Description>) {
    let how = match outcome(ensured) {
        "started" => "started",
        "upgraded" => "replaces a daemon of another build",
        _ => "was already running",
    };
    let pid = pid(ensured, description).map(|pid| format!("pid {pid}, ")).unwrap_or_default();
    printer.line("daemon", Colour::Green, &format!("{how} ({pid}HTTP port {})", ensured.http_port));
    if let Some(description) = description {
        print_http(printer, &description.http);
    }
    let engine = description.and_then(|description| description.engine.as_ref());
    printer.line("engine", Colour::Green, &describe_engine(engine));
    if let Some(helper) = description.and_then(|description| description.docker_helper.as_ref()) {
        print_helper(printer, helper);
    }
    if let Some(description) = description {
        trust::print_withheld(printer, &description.containers);
    }
}

/// Prints one line for each process that holds a port to which containers send their tokens.
pub(super) fn print_http(printer: Printer, http: &HttpFacts) {
    if let Some(held) = &http.fallback {
        let text = format!("{held}; containers that were started before send their tokens there");
        printer.line("http", Colour::Red, &text);
    }
    match &http.gateway {
        Some(Gateway::Held { by }) => {
            printer.line("http", Colour::Red, &format!("{by}; containers send their tokens there"));
        }
        Some(Gateway::Failed { address, reason }) => {
            printer.line("http", Colour::Yellow, &format!("containers cannot reach {address}: {reason}"));
        }
        Some(Gateway::Listening { .. } | Gateway::Elsewhere { .. }) | None => {}
    }
}

/// Prints the state of the helper container on one line.
pub(super) fn print_helper(printer: Printer, helper: &HelperFacts) {
    let name = &helper.container;
    let (colour, words) = match (helper.state, &helper.reason) {
        (HelperState::Running, _) => (Colour::Green, format!("{name} runs; {ACCESS}")),
        (HelperState::Starting, _) => (Colour::Yellow, format!("{name} is starting")),
        (HelperState::Failed, reason) => {
            let reason = reason.as_deref().unwrap_or("unknown reason");
            (Colour::Yellow, format!("{name} is unavailable: {reason}"))
        }
    };
    printer.line("helper", colour, &words);
}

/// Formats the state of the engine on one line.
pub(super) fn describe_engine(engine: Option<&EngineFacts>) -> String {
    let Some(engine) = engine else { return "starts when the first container is forwarded".to_owned() };
    let mut words = engine.ring.clone();
    if let Some(reason) = &engine.reason {
        words.push_str(&format!(", since {reason}"));
    }
    if let Some(pid) = engine.pid {
        words.push_str(&format!(" (pid {pid})"));
    }
    if engine.draining > 0 {
        words.push_str(&format!(
            "; engines of earlier builds that finish their connections: {}",
            engine.draining
        ));
    }
    words
}

/// Prints the options that have no effect, since a running daemon keeps the options with which it was started.
fn warn_about_ignored_options(args: &UpArgs, ensured: &Ensured, description: Option<&Description>) {
    let printer = Printer::to_stderr(args.json);
    let mut ignored = args.daemon.clone();
    // The port is in effect, even if another start of the daemon set it.
    ignored.http_port = ignored.http_port.filter(|port| *port != ensured.http_port.get());
    ignored.all &= !description.is_some_and(|description| description.all);
    ignored.tailscale &= !description.is_some_and(|description| description.tailscale);
    ignored.sockets = ignored
        .sockets
        .filter(|sockets| description.is_none_or(|description| description.sockets != *sockets));
    ignored.docker_helper &= description.is_none_or(|description| description.docker_helper.is_none());
    let given = ignored.words();
    if !ensured.spawned && !given.is_empty() {
        let words: Vec<_> = given.iter().map(|word| word.to_string_lossy()).collect();
        let text = format!("the running daemon keeps its options; {} was not applied", words.join(" "));
        let hint = Some("run landfall down, then landfall up with these options".to_owned());
        printer.report(&Report::Warning { text, hint });
    }
    let wanted = args.daemon.http_port.unwrap_or(port_policy::HTTP_PORT);
    if ensured.spawned && wanted != 0 && wanted != ensured.http_port.get() {
        let text = format!(
            "port {wanted} is in use; the daemon listens for containers on port {}",
            ensured.http_port
        );
        let hint = Some(
            "containers that were started earlier use the old port; free it, then run landfall down and landfall up".to_owned(),
        );
        printer.report(&Report::Warning { text, hint });
    }
}
