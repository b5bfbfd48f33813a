//! The command line. clap parses the arguments into checked values, and one module per verb does the work.
//!
//! A verb ends in one of two states: an [`exit::Exit`], or an [`exit::Failure`], which is printed as one line, an
//! optional hint and an exit code. Verbs return; they never call `exit`, and they print only through `ui`.

pub mod agent;
pub mod args;
pub mod attach;
pub mod daemon_client;
pub mod deregister;
pub mod detach;
pub mod doctor;
pub mod down;
pub mod events;
pub mod exit;
pub mod foreground;
pub mod forwarding;
pub mod grant;
pub mod helper;
pub mod hostd;
pub mod logs;
pub mod ls;
mod native;
pub mod register;
pub mod restart;
pub mod revoke;
pub mod run;
pub mod start;
pub mod status;
pub mod stop;
mod traffic;
pub mod trust;
pub mod ui;
pub mod up;
pub mod version;

use std::ffi::OsString;
use std::process::ExitCode;

use clap::Parser;
use clap::error::ErrorKind;
use landfall_engine::opener;
use tokio::runtime::{Builder, Runtime};

use crate::error::chain;
use crate::sys::sandbox;
use args::{Cli, Verb};
use exit::{Exit, Failure};
use ui::output::Printer;

/// Parses `arguments`, of which the first is the program's name, and runs the verb.
pub fn main(arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    let arguments: Vec<OsString> = arguments.into_iter().collect();
    let cli = match Cli::try_parse_from(&arguments) {
        Ok(cli) => cli,
        Err(error) => return print_parse_error(&error, &arguments),
    };
    let json = cli.verb.json();
    let done = match cli.verb {
        Verb::Run(args) => run::run(args),
        Verb::Attach(args) => attach::attach(args),
        Verb::Detach(args) => detach::detach(&args),
        Verb::Doctor(args) => doctor::doctor(&args),
        Verb::Up(args) => up::up(&args),
        Verb::Down(args) => down::down(&args),
        Verb::Status(args) => status::status(&args),
        Verb::Ls(args) => ls::ls(&args),
        Verb::Register(args) => register::register(&args),
        Verb::Deregister(args) => deregister::deregister(&args),
        Verb::Grant(args) => grant::grant(&args),
        Verb::Revoke(args) => revoke::revoke(&args),
        Verb::Restart(args) => restart::restart(&args),
        Verb::Start(args) => start::start(&args),
        Verb::Stop(args) => stop::stop(&args),
        Verb::Trust(args) => trust::trust(&args),
        Verb::Events(args) => events::events(&args),
        Verb::Logs(args) => logs::logs(&args),
        Verb::Version(args) => version::version(&args),
        Verb::Agent(args) => agent::agent(args),
        Verb::Sandbox(args) => {
            sandbox::inside::main(&args.command);
            Ok(Exit::Failed)
        }
        Verb::Hostd(args) => hostd::hostd(args),
        Verb::Launcher(args) => hostd::launcher(&args),
        Verb::Engine(args) => match foreground::engine_process(&args.socket) {
            Ok(()) => Ok(Exit::Ok),
            Err(error) => Err(Failure::new(Exit::Failed, chain(error.as_ref()))),
        },
        // The opener has already reported the error to its parent process.
        Verb::Opener => Ok(opener::serve::main(rustix::stdio::stdin()).map_or(Exit::Failed, |()| Exit::Ok)),
        Verb::Helper(args) => helper::helper(&args),
        Verb::Keeper(args) => {
            sandbox::keeper::main(args.pid);
            Ok(Exit::Ok)
        }
        Verb::Tied(args) => Err(Failure::new(Exit::Failed, sandbox::pasta::tied(&args.command).to_string())),
    };
    match done {
        Ok(exit) => exit.into(),
        Err(failure) => {
            Printer::to_stderr(json).failure(&failure);
            failure.exit.into()
        }
    }
}

/// Builds a single-threaded runtime for a verb that uses asynchronous clients or servers.
fn runtime() -> Result<Runtime, Failure> {
    let runtime = Builder::new_current_thread().enable_all().build();
    runtime.map_err(|error| Failure::new(Exit::Failed, chain(&error)))
}

/// Handles a command line that clap did not parse. clap prints help and version; every other outcome is a usage error,
/// printed as a [`Failure`].
fn print_parse_error(error: &clap::Error, arguments: &[OsString]) -> ExitCode {
    if matches!(
        error.kind(),
        ErrorKind::DisplayHelp
            | ErrorKind::DisplayVersion
            | ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand
    ) {
        // A failed write is ignored: the terminal is closed.
        let _ = error.print();
        return if error.use_stderr() { Exit::Usage.into() } else { Exit::Ok.into() };
    }
    let given = |word: &str| {
        arguments.iter().take_while(|argument| *argument != "--").any(|argument| argument == word)
    };
    let verb = arguments.get(1).and_then(|verb| verb.to_str()).filter(|verb| VERBS.contains(verb));
    Printer::to_stderr(given("--json")).failure(&usage_failure(error, verb));
    Exit::Usage.into()
}

const VERBS: [&str; 21] = [
    "run",
    "attach",
    "detach",
    "doctor",
    "up",
    "down",
    "status",
    "ls",
    "list",
    "register",
    "deregister",
    "grant",
    "revoke",
    "restart",
    "start",
    "stop",
    "trust",
    "events",
    "logs",
    "version",
    "agent",
];

/// Converts clap's error to a failure: its first paragraph on one line, and as the hint its tip or the help command.
fn usage_failure(error: &clap::Error, verb: Option<&str>) -> Failure {
    let page = error.render().to_string();
    let first = page.split("\n\n").next().unwrap_or_default();
    let message = first.split_whitespace().collect::<Vec<_>>().join(" ");
    let message = message.strip_prefix("error: ").unwrap_or(&message);
    let tip = page.lines().find_map(|line| line.trim().strip_prefix("tip: "));
    let (message, hint) = match (verb, error.kind(), tip) {
        (Some("run"), ErrorKind::MissingRequiredArgument, _) => {
            ("no command is given", "give it after --, such as: landfall run -- npm run dev".to_owned())
        }
        (Some("attach"), ErrorKind::MissingRequiredArgument, _) => (
            "no container is named, and neither --pid nor --netns is given",
            "name one, such as: landfall attach shop".to_owned(),
        ),
        (
            Some(verb @ ("register" | "deregister" | "detach" | "restart")),
            ErrorKind::MissingRequiredArgument,
            _,
        ) => ("no container is named", format!("name one, such as: landfall {verb} shop")),
        (Some(verb @ ("grant" | "revoke")), ErrorKind::MissingRequiredArgument, _) => (
            "a container and at least one right are needed",
            format!("name both, such as: landfall {verb} shop rebuild"),
        ),
        (Some("run"), ErrorKind::UnknownArgument, _) if !message.contains("'-") => {
            (message, "put -- before the command: landfall run -- npm run dev".to_owned())
        }
        (_, _, Some(tip)) => (message, tip.to_owned()),
        (Some(verb), _, None) => (message, format!("see landfall {verb} --help")),
        (None, _, None) => (message, "see landfall --help".to_owned()),
    };
    Failure::new(Exit::Usage, message).hint(hint)
}
