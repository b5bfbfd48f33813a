//! `landfall agent`: runs the agent inside a container, or sends a request to the running agent or to the daemon on the
//! host.

use std::io;

use serde_json::json;

use super::args::{AgentArgs, AgentForwardArgs, AgentRestartArgs, AgentServeArgs, AgentVerb, Candidates};
use super::exit::{Exit, Failure};
use crate::agent::hostd::{Hostd, HostdError};
use crate::agent::local::{self, AskError, Question, RefusalReason, Reply};
use crate::agent::log::Log;
use crate::agent::{self, DirectoryError, Options, PORT, StartError};
use crate::cli::ui::output::Printer;
use crate::error::chain;
use crate::model::registration::{ContainerName, Token};

/// The variables that may hold the broker token (wire specification, A.12); the first one that is set counts.
const TOKEN_VARIABLES: [&str; 2] = ["LANDFALL_HOSTD_BROKER_TOKEN", "TYPECLAW_HOSTD_BROKER_TOKEN"];

/// The variables that name the container (wire specification, A.12); the first one that is set counts.
const NAME_VARIABLES: [&str; 2] = ["LANDFALL_CONTAINER_NAME", "TYPECLAW_CONTAINER_NAME"];

/// Runs the agent until a signal ends it, or sends a request.
pub fn agent(args: AgentArgs) -> Result<Exit, Failure> {
    match args.verb {
        Some(AgentVerb::Forward(args)) => forward(&args),
        Some(AgentVerb::Restart(args)) => restart(&args),
        None => serve(args.serve),
    }
}

fn serve(args: AgentServeArgs) -> Result<Exit, Failure> {
    let port = args.port;
    let options = Options {
        address: args.bind,
        port,
        token: token()?,
        name: name(),
        directory: args.directory,
        interval: args.interval,
    };
    let printer = Printer::to_stderr(true);
    // The agent continues without a log after the reader of standard error has closed it.
    let log = Log::to(move |line| drop(printer.try_print(line)));
    let runtime = super::runtime()?;
    let done = runtime.block_on(agent::run(options, log));
    // Blocking tasks are not awaited: all work that has to finish is done.
    runtime.shutdown_background();
    done.map(|()| Exit::Ok).map_err(|error| start_failure(&error))
}

/// The container's name, if a variable holds a valid one.
fn name() -> Option<ContainerName> {
    let set =
        NAME_VARIABLES.iter().find_map(|name| std::env::var(name).ok().filter(|value| !value.is_empty()));
    ContainerName::new(&set?).ok()
}

fn token() -> Result<Option<Token>, Failure> {
    for name in TOKEN_VARIABLES {
        let Some(value) = std::env::var_os(name) else { continue };
        let value = value.into_string().map_err(|_| {
            Failure::new(Exit::Usage, format!("{name} is not UTF-8"))
                .hint("a broker token is 43 letters, digits, '-' and '_'")
        })?;
        // An empty token counts as absent.
        if let Some(token) = Token::new(&value) {
            return Ok(Some(token));
        }
    }
    Ok(None)
}

fn start_failure(error: &StartError) -> Failure {
    let failure = |exit| Failure::new(exit, chain(error));
    match error {
        StartError::Useless => failure(Exit::Usage).hint(
            "set LANDFALL_HOSTD_BROKER_TOKEN to the container's token, or mount a directory of the host at /run/landfall",
        ),
        StartError::Listen { source, .. } => match source.kind() {
            io::ErrorKind::AddrInUse => failure(Exit::Failed)
                .hint("another agent may be running here; --port selects another port, which the host has to publish"),
            io::ErrorKind::PermissionDenied => {
                failure(Exit::Denied).hint("ports below 1024 may need privileges; --port selects another port")
            }
            _ => failure(Exit::Failed).hint("--bind needs an address of this container"),
        },
        StartError::Directory(DirectoryError::Taken(_)) => {
            failure(Exit::Failed).hint("each container needs its own directory; --directory selects another one")
        }
        StartError::Directory(DirectoryError::NotASocket(_)) => {
            failure(Exit::Failed).hint("remove it, or select another directory with --directory")
        }
        StartError::Directory(DirectoryError::System { source, .. }) => match source.kind() {
            io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => failure(Exit::Denied)
                .hint("the user in the container must be able to write to it: on the host, chmod 0777 the directory"),
            _ => failure(Exit::Failed).hint("--directory needs a directory that the host has mounted"),
        },
        StartError::Signals(_) | StartError::Thread(_) => failure(Exit::Failed),
    }
}

fn forward(args: &AgentForwardArgs) -> Result<Exit, Failure> {
    let candidates = args.host.clone().unwrap_or_else(|| Candidates(vec![args.port]));
    let question = Question::Forward {
        target_port: args.port,
        host_candidates: candidates.0,
        reason: args.reason.clone(),
        wait_ms: u64::try_from(args.wait.as_millis()).unwrap_or(u64::MAX),
    };
    let reply = local::ask(args.agent_port, &question, args.wait).map_err(|error| ask_failure(&error))?;
    match reply {
        Reply::Forwarded(port) => {
            let printer = Printer::to_stdout(args.json);
            if args.json {
                printer.print(&json!({ "targetPort": args.port, "hostPort": port }).to_string());
            } else {
                printer.print(&port.to_string());
            }
            Ok(Exit::Ok)
        }
        Reply::Not(why, reason) => Err(forward_failure(args, why, &reason)),
    }
}

fn restart(args: &AgentRestartArgs) -> Result<Exit, Failure> {
    let variable = |name: &str| std::env::var(name).ok();
    let hostd = Hostd::from_variables(variable).map_err(|error| restart_failure(&error))?;
    let name = name().ok_or_else(|| {
        Failure::new(Exit::Usage, "the name of this container is unknown")
            .hint("set LANDFALL_CONTAINER_NAME, as landfall start does")
    })?;
    let request = json!({ "kind": "restart", "containerName": name.as_str(), "build": args.build });
    let asked = super::runtime()?.block_on(hostd.ask(&request));
    asked.map_err(|error| restart_failure(&error))?;
    let printer = Printer::to_stdout(args.json);
    if args.json {
        printer.print(&json!({ "containerName": name, "outcome": "scheduled" }).to_string());
    } else {
        printer.print(&format!("{name} is scheduled for a restart"));
    }
    Ok(Exit::Ok)
}

fn restart_failure(error: &HostdError) -> Failure {
    let failure = |exit| Failure::new(exit, chain(error));
    match error {
        HostdError::NoEndpoint | HostdError::Url | HostdError::NoToken => failure(Exit::NoDaemon)
            .hint("landfall start sets these variables in the containers that it creates"),
        HostdError::Unreachable(_) | HostdError::Broken(_) | HostdError::Nonsense => {
            failure(Exit::NoDaemon).hint("on the host, landfall status shows whether the daemon runs")
        }
        HostdError::Late => failure(Exit::TimedOut),
        HostdError::Refused { status: 401 | 403, .. } => {
            failure(Exit::Denied).hint("on the host, landfall ls shows whether this container is registered")
        }
        HostdError::Refused { .. } => failure(Exit::Refused),
    }
}

fn ask_failure(error: &AskError) -> Failure {
    let failure = Failure::new(Exit::NoDaemon, chain(error));
    match error {
        AskError::NoAgent(PORT) => failure.hint("start the agent: landfall agent &"),
        AskError::NoAgent(_) => {
            failure.hint("--agent-port must be the port with which the agent was started")
        }
        AskError::Broken(_) | AskError::Nonsense => {
            failure.hint("the agent's standard error shows what it did last")
        }
    }
}

fn forward_failure(args: &AgentForwardArgs, why: RefusalReason, reason: &str) -> Failure {
    let port = args.port;
    match why {
        RefusalReason::Refused => {
            Failure::new(Exit::Refused, format!("the host does not forward port {port}: {reason}"))
                .hint("--host lists ports on the host to try one after another")
        }
        RefusalReason::NoHost => Failure::new(Exit::NoDaemon, reason.to_owned())
            .hint("the request is remembered; register the container on the host, with its broker token"),
        RefusalReason::TimedOut => Failure::new(Exit::TimedOut, reason.to_owned())
            .hint("the request is remembered; use --wait to wait longer"),
        RefusalReason::NoToken => Failure::new(Exit::NoDaemon, reason.to_owned())
            .hint("start the agent with LANDFALL_HOSTD_BROKER_TOKEN in its environment"),
        RefusalReason::Full => Failure::new(Exit::Refused, reason.to_owned()),
        RefusalReason::Invalid => Failure::new(Exit::Usage, reason.to_owned())
            .hint("the running agent may be of another build: restart it"),
    }
}
