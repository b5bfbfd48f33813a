//! `landfall up`: one daemon of this build runs when it returns.

use std::os::unix::process::CommandExt;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::json;

use super::args::UpArgs;
use super::exit::{Exit, Failure};
use super::trust;
use crate::cli::daemon_client::{self, Description};
use crate::cli::ui::output::{Colour, Report, Talk};
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

/// How long a helper that is being made is waited for; its image is brought to the engine the first time.
const HELPER_MAX: Duration = Duration::from_secs(30);
/// The longest wait for the registrations of the last daemon, so that folders without an approval can be named. It takes
/// milliseconds, unless Docker is slow to answer.
const REPLAY_MAX: Duration = Duration::from_secs(2);
/// The interval between two questions to the daemon meanwhile.
const POLL: Duration = Duration::from_millis(20);

/// Starts the daemon, or finds it, or puts this build in the place of another one.
pub fn up(args: &UpArgs) -> Result<Exit, Failure> {
    let home = daemon_client::home()?;
    let client = Client::new(home.socket());
    if args.foreground {
        return become_daemon(args, &client);
    }
    if args.daemon.docker_helper {
        // The daemon is this program, too, and would find out when nobody looks.
        Program::own().map_err(|error| Failure::new(Exit::Refused, chain(&error)).hint(error.hint()))?;
    }
    let ensured = daemon_client::ensured(home, args.daemon.words())?;
    let description = described(&client)?;
    let talk = Talk::to_stdout(args.json);
    if args.json {
        talk.plain(&to_json(&ensured, description.as_ref()).to_string());
    } else {
        to_text(talk, &ensured, description.as_ref());
    }
    warn_of_what_was_ignored(args, &ensured, description.as_ref());
    Ok(Exit::Ok)
}

/// Returns the daemon's description, once its helper runs or has failed and the registrations of the last daemon are back.
fn described(client: &Client) -> Result<Option<Description>, Failure> {
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
        return Err(Failure::new(Exit::Refused, "a daemon runs already").hint("landfall down stops it"));
    }
    let wanted = DesiredDaemon::own(daemon_client::home()?, args.daemon.words());
    let mut command = Command::new(&wanted.program);
    command.arg0("landfall").arg("_hostd").args(&wanted.arguments);
    let error = token_variables::remove_from(&mut command).exec();
    Err(Failure::new(Exit::Failed, format!("cannot become the daemon: {}", chain(&error))))
}

/// What came of it, in one word.
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

fn to_text(talk: Talk, ensured: &Ensured, description: Option<&Description>) {
    let how = match outcome(ensured) {
        "started" => "started",
        "upgraded" => "takes the place of another build",
        _ => "was running already",
    };
    let pid = pid(ensured, description).map(|pid| format!("pid {pid}, ")).unwrap_or_default();
    talk.line("daemon", Colour::Green, &format!("{how} ({pid}HTTP port {})", ensured.http_port));
    if let Some(description) = description {
        tell_http(talk, &description.http);
    }
    let engine = description.and_then(|description| description.engine.as_ref());
    talk.line("engine", Colour::Green, &engine_in_words(engine));
    if let Some(helper) = description.and_then(|description| description.docker_helper.as_ref()) {
        tell_helper(talk, helper);
    }
    if let Some(description) = description {
        trust::print_withheld(talk, &description.containers);
    }
}

/// The processes that hold a port to which containers send their tokens, a line each.
pub(super) fn tell_http(talk: Talk, http: &HttpFacts) {
    if let Some(held) = &http.fallback {
        let text = format!("{held}; containers that were started before send their tokens there");
        talk.line("http", Colour::Red, &text);
    }
    match &http.gateway {
        Some(Gateway::Held { by }) => {
            talk.line("http", Colour::Red, &format!("{by}; containers send their tokens there"));
        }
        Some(Gateway::Failed { address, reason }) => {
            talk.line("http", Colour::Yellow, &format!("containers do not reach {address}: {reason}"));
        }
        Some(Gateway::Listening { .. } | Gateway::Elsewhere { .. }) | None => {}
    }
}

/// The container that enters others, on one line.
pub(super) fn tell_helper(talk: Talk, helper: &HelperFacts) {
    let name = &helper.container;
    let (colour, words) = match (helper.state, &helper.reason) {
        (HelperState::Running, _) => (Colour::Green, format!("{name} runs; {ACCESS}")),
        (HelperState::Starting, _) => (Colour::Yellow, format!("{name} is being made")),
        (HelperState::Failed, reason) => {
            let reason = reason.as_deref().unwrap_or("for no reason that is known");
            (Colour::Yellow, format!("{name} cannot be had: {reason}"))
        }
    };
    talk.line("helper", colour, &words);
}

/// The engine on one line.
pub(super) fn engine_in_words(engine: Option<&EngineFacts>) -> String {
    let Some(engine) = engine else { return "starts with the first container that is forwarded".to_owned() };
    let mut words = engine.ring.clone();
    if let Some(reason) = &engine.reason {
        words.push_str(&format!(", since {reason}"));
    }
    if let Some(pid) = engine.pid {
        words.push_str(&format!(" (pid {pid})"));
    }
    if engine.draining > 0 {
        words.push_str(&format!("; of an earlier build, finishing their connections: {}", engine.draining));
    }
    words
}

/// A daemon that runs already keeps the options that it was started with.
fn warn_of_what_was_ignored(args: &UpArgs, ensured: &Ensured, description: Option<&Description>) {
    let talk = Talk::to_stderr(args.json);
    let mut ignored = args.daemon.clone();
    // It listens there, whoever said so.
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
        let text = format!("the daemon that runs keeps its own options; {} was not applied", words.join(" "));
        let hint = Some("landfall down, and up again with them".to_owned());
        talk.report(&Report::Warning { text, hint });
    }
    let wanted = args.daemon.http_port.unwrap_or(port_policy::HTTP_PORT);
    if ensured.spawned && wanted != 0 && wanted != ensured.http_port.get() {
        let text =
            format!("port {wanted} is in use; containers reach the daemon at {} now", ensured.http_port);
        let hint = Some(
            "those that were started before find it there no more; free the port, and up again".to_owned(),
        );
        talk.report(&Report::Warning { text, hint });
    }
}
