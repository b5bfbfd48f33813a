//! `landfall agent`: the program inside a container; and what programs beside it ask of it.

use std::io;

use serde_json::json;

use super::args::{AgentArgs, AgentForwardArgs, AgentRestartArgs, AgentServeArgs, AgentVerb, Candidates};
use super::exit::{Exit, Failure};
use crate::agent::hostd::{Hostd, HostdError};
use crate::agent::local::{self, AskError, Question, RefusalReason, Reply};
use crate::agent::log::Log;
use crate::agent::{self, DirectoryError, Options, PORT, StartError};
use crate::cli::ui::output::Talk;
use crate::error::chain;
use crate::model::registration::{ContainerName, Token};

/// Where the broker token is looked for (wire specification, A.12), the first that is set.
const TOKEN_VARIABLES: [&str; 2] = ["LANDFALL_HOSTD_BROKER_TOKEN", "TYPECLAW_HOSTD_BROKER_TOKEN"];

/// The variables that name the container (wire specification, A.12); the first one that is set counts.
const NAME_VARIABLES: [&str; 2] = ["LANDFALL_CONTAINER_NAME", "TYPECLAW_CONTAINER_NAME"];

/// Is an agent until it is told to stop, or asks the one that runs.
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
    let talk = Talk::to_stderr(true);
    // The agent goes on without a log if the reader of standard error has gone.
    let log = Log::to(move |line| drop(talk.try_plain(line)));
    let runtime = super::runtime()?;
    let done = runtime.block_on(agent::run(options, log));
    // What still blocks somewhere is not waited for: everything that had to be finished is.
    runtime.shutdown_background();
    done.map(|()| Exit::Ok).map_err(|error| refused(&error))
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
        // Empty is as good as not there.
        if let Some(token) = Token::new(&value) {
            return Ok(Some(token));
        }
    }
    Ok(None)
}

fn refused(error: &StartError) -> Failure {
    let failure = |exit| Failure::new(exit, chain(error));
    match error {
        StartError::Useless => failure(Exit::Usage).hint(
            "set LANDFALL_HOSTD_BROKER_TOKEN to the container's token, or mount a directory of the host at /run/landfall",
        ),
        StartError::Listen { source, .. } => match source.kind() {
            io::ErrorKind::AddrInUse => failure(Exit::Failed)
                .hint("an agent may run here already; --port takes another one, which the host has to publish"),
            io::ErrorKind::PermissionDenied => {
                failure(Exit::Denied).hint("ports below 1024 may take privilege; --port takes another one")
            }
            _ => failure(Exit::Failed).hint("--bind takes an address of this container"),
        },
        StartError::Directory(DirectoryError::Taken(_)) => {
            failure(Exit::Failed).hint("each container has a directory of its own; --directory names another one")
        }
        StartError::Directory(DirectoryError::Stranger(_)) => {
            failure(Exit::Failed).hint("remove it, or name another directory with --directory")
        }
        StartError::Directory(DirectoryError::System { source, .. }) => match source.kind() {
            io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => failure(Exit::Denied)
                .hint("the user in the container must be able to write there: on the host, chmod 0777 the directory"),
            _ => failure(Exit::Failed).hint("--directory names a directory that the host has mounted"),
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
    let reply = local::ask(args.agent_port, &question, args.wait).map_err(|error| unanswered(&error))?;
    match reply {
        Reply::Forwarded(port) => {
            let talk = Talk::to_stdout(args.json);
            if args.json {
                talk.plain(&json!({ "targetPort": args.port, "hostPort": port }).to_string());
            } else {
                talk.plain(&port.to_string());
            }
            Ok(Exit::Ok)
        }
        Reply::Not(why, reason) => Err(not_forwarded(args, why, &reason)),
    }
}

fn restart(args: &AgentRestartArgs) -> Result<Exit, Failure> {
    let variable = |name: &str| std::env::var(name).ok();
    let hostd = Hostd::from_variables(variable).map_err(|error| not_restarted(&error))?;
    let name = name().ok_or_else(|| {
        Failure::new(Exit::Usage, "the name of this container is not known")
            .hint("LANDFALL_CONTAINER_NAME holds it in a container of landfall start")
    })?;
    let request = json!({ "kind": "restart", "containerName": name.as_str(), "build": args.build });
    let asked = super::runtime()?.block_on(hostd.ask(&request));
    asked.map_err(|error| not_restarted(&error))?;
    let talk = Talk::to_stdout(args.json);
    if args.json {
        talk.plain(&json!({ "containerName": name, "outcome": "scheduled" }).to_string());
    } else {
        talk.plain(&format!("{name} is about to be restarted"));
    }
    Ok(Exit::Ok)
}

fn not_restarted(error: &HostdError) -> Failure {
    let failure = |exit| Failure::new(exit, chain(error));
    match error {
        HostdError::NoEndpoint | HostdError::Url | HostdError::NoToken => {
            failure(Exit::NoDaemon).hint("landfall start gives them to the containers that it makes")
        }
        HostdError::Unreachable(_) | HostdError::Broken(_) | HostdError::Nonsense => {
            failure(Exit::NoDaemon).hint("on the host, landfall status tells whether the daemon runs")
        }
        HostdError::Late => failure(Exit::TimedOut),
        HostdError::Refused { status: 401 | 403, .. } => {
            failure(Exit::Denied).hint("on the host, landfall ls tells whether this container is registered")
        }
        HostdError::Refused { .. } => failure(Exit::Refused),
    }
}

fn unanswered(error: &AskError) -> Failure {
    let failure = Failure::new(Exit::NoDaemon, chain(error));
    match error {
        AskError::NoAgent(PORT) => failure.hint("start one: landfall agent &"),
        AskError::NoAgent(_) => failure.hint("--agent-port names the port that it was started with"),
        AskError::Broken(_) | AskError::Nonsense => {
            failure.hint("its standard error tells what the agent last did")
        }
    }
}

fn not_forwarded(args: &AgentForwardArgs, why: RefusalReason, reason: &str) -> Failure {
    let port = args.port;
    match why {
        RefusalReason::Refused => {
            Failure::new(Exit::Refused, format!("the host does not forward port {port}: {reason}"))
                .hint("--host names ports on the host to try one after another")
        }
        RefusalReason::NoHost => Failure::new(Exit::NoDaemon, reason.to_owned())
            .hint("the request is remembered; register the container on the host, with its broker token"),
        RefusalReason::TimedOut => Failure::new(Exit::TimedOut, reason.to_owned())
            .hint("the request is remembered; --wait waits longer"),
        RefusalReason::NoToken => Failure::new(Exit::NoDaemon, reason.to_owned())
            .hint("start the agent with LANDFALL_HOSTD_BROKER_TOKEN in its environment"),
        RefusalReason::Full => Failure::new(Exit::Refused, reason.to_owned()),
        RefusalReason::Invalid => Failure::new(Exit::Usage, reason.to_owned())
            .hint("the agent that runs may be of another build: start it again"),
    }
}
