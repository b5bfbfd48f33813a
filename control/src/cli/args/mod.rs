//! The arguments of every verb. This module only defines and parses them: the verbs are in their own modules. The doc
//! comments of arguments are the texts of `--help`.

mod agent;
mod daemon;
mod start;
mod trust;

use std::ffi::OsString;
use std::num::NonZeroU32;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

pub use agent::{AgentArgs, AgentForwardArgs, AgentRestartArgs, AgentServeArgs, AgentVerb, Candidates};
pub use daemon::{
    AttachMethodArgs, DaemonArgs, DeregisterArgs, DetachArgs, EventsArgs, GrantArgs, HelperArgs,
    LauncherArgs, LogsArgs, LsArgs, PlainArgs, RegisterArgs, RestartArgs, RevokeArgs, StatusArgs, UpArgs,
};

pub use start::{StartArgs, StopArgs};
pub use trust::TrustArgs;

use crate::model::native_sockets::{OnConflict, Sockets};
use crate::model::port_policy::{Policy, PortList};
use crate::model::registration::ContainerName;

/// Makes servers that listen in containers reachable on the host's localhost.
#[derive(Debug, Parser)]
#[command(name = "landfall", version, max_term_width = 100, after_help = EXIT_CODES)]
#[command(disable_help_subcommand = true, arg_required_else_help = true)]
pub struct Cli {
    /// The verb.
    #[command(subcommand)]
    pub verb: Verb,
}

const EXIT_CODES: &str = "\
Exit codes:
  0        success; after `run`, the exit code of the command
  1        `doctor`: forwarding does not work here
  2        invalid command line
  3        no such container, process or namespace
  4        not permitted
  5        no daemon runs, or it could not be started or reached
  6        the daemon refused the request, or the request failed
  124      `agent forward`, `agent restart`: no answer in time
  125      landfall itself failed
  126/127  `run`: the command cannot be executed / does not exist
  128+N    `run`: signal N ended the command";

const RUN_NOTES: &str = "\
The command has the standard streams, signals and exit code that it would have without landfall.
Messages of landfall go to standard error, also with --json. When the command ends, landfall ends
the processes that it left in its network, since their ports can no longer be reached.

It isolates the network and the user namespace (as root, where user namespaces are forbidden, only
the network), not files or processes: the command runs as you, and can reach ~/.bashrc, docker.sock
(which is root) and the daemon's hostd.sock. Run untrusted code in a container.

With native sockets (--sockets auto, the default, or native) a server listens directly on the
host's localhost, without any loss of speed. It then holds a socket of the host's network: a
malicious program can use it to connect to any service on the host's localhost. --net none and
--sockets relay keep the command in its own network. Use --sockets relay also for programs that do
not work with native sockets, and for several worktrees on one port. LANDFALL_SOCKETS sets the
default.

Example: landfall run -- npm run dev";

const ATTACH_NOTES: &str = "\
The daemon forwards the container from now on, whenever it runs, also after it has been recreated
under the same name. Containers whose label dev.landfall.forward is true need no attach.

Example: landfall attach shop";

const UP_NOTES: &str = "\
The daemon stores its files in $LANDFALL_HOME, or else $TYPECLAW_HOME, or else ~/.landfall: its
socket in run/, its registrations in run/registrations/, its log in log/. Each of these directories
has one daemon.";

const REGISTER_NOTES: &str = "\
Without an attach method (--pid, --netns, --docker, --agent, --websocket) the daemon records the
container but does not enter it, as for clients of the reference implementation. Such a container
may rebuild itself: see landfall grant --help.

Tokens are read from files or from the environment, never from the command line, which every user
of this machine can read.

Example: landfall register shop --docker --allow 3000,5173";

/// The verbs. landfall starts its own processes with the verbs whose names start with `_`.
#[derive(Debug, Subcommand)]
pub enum Verb {
    /// Run a command in its own network; ports that it listens on answer on localhost
    #[command(after_help = RUN_NOTES)]
    Run(RunArgs),
    /// Forward the ports of a Docker container, or of an existing network namespace
    #[command(after_help = ATTACH_NOTES)]
    Attach(AttachArgs),
    /// Stop forwarding a Docker container, also if its labels ask for it
    Detach(DetachArgs),
    /// Show what this machine allows, and whether forwarding works
    Doctor(DoctorArgs),
    /// Start the daemon, or replace a daemon of another build; it registers containers and forwards their ports
    #[command(after_help = UP_NOTES)]
    Up(UpArgs),
    /// Stop the daemon and its relay engine; registrations are kept
    Down(PlainArgs),
    /// Show the status of the daemon or of one container
    Status(StatusArgs),
    /// List registered containers and forwarded ports
    #[command(visible_alias = "list")]
    Ls(LsArgs),
    /// Register a container with the daemon, and forward its ports
    #[command(after_help = REGISTER_NOTES)]
    Register(RegisterArgs),
    /// Remove a container's registration and grants
    Deregister(DeregisterArgs),
    /// Grant a container additional rights, such as rebuilding its image
    #[command(after_help = daemon::GRANT_NOTES)]
    Grant(GrantArgs),
    /// Revoke rights that `grant` gave
    Revoke(RevokeArgs),
    /// Restart a container through the daemon
    Restart(RestartArgs),
    /// Create a container from a folder and run it; ports in it answer on localhost
    #[command(after_help = start::START_NOTES)]
    Start(StartArgs),
    /// Stop and remove a container that `start` has created
    #[command(after_help = start::STOP_NOTES)]
    Stop(StopArgs),
    /// Approve what the files of a folder request: commands, secrets, ports below 1024
    #[command(after_help = trust::TRUST_NOTES)]
    Trust(TrustArgs),
    /// Print the daemon's events as they happen
    Events(EventsArgs),
    /// Print the daemon's log
    Logs(LogsArgs),
    /// Show the build of this program and of the daemon
    Version(PlainArgs),
    /// Inside a container: make its ports reachable for a host, without any privileges
    #[command(after_help = agent::AGENT_NOTES)]
    Agent(AgentArgs),
    /// The first process of a sandbox
    #[command(name = "_sandbox", hide = true)]
    Sandbox(InnerArgs),
    /// The daemon
    #[command(name = "_hostd", hide = true)]
    Hostd(DaemonArgs),
    /// The process that keeps the capabilities of a root daemon
    #[command(name = "_launcher", hide = true)]
    Launcher(LauncherArgs),
    /// The relay engine, driven over a socket
    #[command(name = "_engine", hide = true)]
    Engine(EngineArgs),
    /// The process that opens sockets inside a namespace
    #[command(name = "_opener", hide = true)]
    Opener,
    /// The process that starts openers for a user, inside the helper container
    #[command(name = "_helper", hide = true)]
    Helper(HelperArgs),
    /// Runs a program that ends with the process that started it
    #[command(name = "_tied", hide = true)]
    Tied(InnerArgs),
    /// The process that ends a sandbox when landfall dies
    #[command(name = "_keeper", hide = true)]
    Keeper(KeeperArgs),
}

impl Verb {
    /// Returns whether errors are printed as JSON.
    pub fn json(&self) -> bool {
        match self {
            Verb::Run(args) => args.common.json,
            Verb::Attach(args) => args.common.json,
            Verb::Doctor(args) => args.json,
            Verb::Up(args) => args.json,
            Verb::Down(args) | Verb::Version(args) => args.json,
            Verb::Ls(args) => args.json,
            Verb::Detach(args) => args.json,
            Verb::Status(args) => args.json,
            Verb::Register(args) => args.json,
            Verb::Deregister(args) => args.json,
            Verb::Grant(args) => args.json,
            Verb::Revoke(args) => args.json,
            Verb::Restart(args) => args.json,
            Verb::Start(args) => args.json,
            Verb::Stop(args) => args.json,
            Verb::Trust(args) => args.json,
            Verb::Events(args) => args.json,
            Verb::Logs(args) => args.json,
            Verb::Agent(args) => match &args.verb {
                Some(AgentVerb::Forward(args)) => args.json,
                Some(AgentVerb::Restart(args)) => args.json,
                None => false,
            },
            Verb::Sandbox(_)
            | Verb::Hostd(_)
            | Verb::Launcher(_)
            | Verb::Engine(_)
            | Verb::Opener
            | Verb::Helper(_)
            | Verb::Tied(_)
            | Verb::Keeper(_) => false,
        }
    }
}

/// The arguments that `run` and `attach` share.
#[derive(Debug, Args)]
pub struct Common {
    /// Name of this namespace in messages and lists
    #[arg(long, value_parser = parse_name)]
    pub name: Option<String>,
    /// Forward only these ports: 3000,8000-8100 or 80,* (ports below 1024 only if named)
    #[arg(long, value_name = "PORTS")]
    pub allow: Option<PortList>,
    /// Never forward these ports
    #[arg(long, value_name = "PORTS")]
    pub deny: Option<PortList>,
    /// The kernel interface that moves the bytes; an explicit choice implies --no-daemon
    #[arg(long, value_enum, default_value_t = Ring::Auto)]
    pub ring: Ring,
    /// Forward with an engine in this process, even if a daemon runs
    #[arg(long)]
    pub no_daemon: bool,
    /// Print events as JSON, one object per line
    #[arg(long)]
    pub json: bool,
}

impl Common {
    /// Returns the port policy of the command line.
    pub fn policy(&self) -> Policy {
        Policy { allow: self.allow.clone(), deny: self.deny.clone().unwrap_or_default() }
    }
}

/// `landfall run`
#[derive(Debug, Args)]
pub struct RunArgs {
    /// The arguments that `attach` has, too.
    #[command(flatten)]
    pub common: Common,
    /// Outbound network of the command: through pasta if it is installed, or none
    #[arg(long, value_enum, default_value_t = Net::Auto)]
    pub net: Net,
    /// How its servers listen: on sockets of the host without a relay, or through the relay [default: auto]
    #[arg(long, value_enum)]
    pub sockets: Option<Sockets>,
    /// Outcome if a server's port is in use on the host [default: `fail` if another program uses it, `relay` if another
    /// container uses it]
    #[arg(long, value_enum)]
    pub on_conflict: Option<OnConflict>,
    /// The command and its arguments
    #[arg(required = true, last = true, value_name = "COMMAND")]
    pub command: Vec<OsString>,
}

/// `landfall attach`
#[derive(Debug, Args)]
pub struct AttachArgs {
    /// The namespaces.
    #[command(flatten)]
    pub target: TargetArgs,
    /// The arguments that `run` has, too.
    #[command(flatten)]
    pub common: Common,
    /// The container's folder on the host
    #[arg(long, value_name = "DIR", requires = "container")]
    pub cwd: Option<PathBuf>,
}

/// Exactly one way to name a namespace.
#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
pub struct TargetArgs {
    /// A container, by its name in Docker; the daemon keeps it until `detach`
    #[arg(value_name = "NAME", value_parser = daemon::container_name)]
    pub container: Option<ContainerName>,
    /// A process in the namespace
    #[arg(long, value_parser = parse_pid)]
    pub pid: Option<NonZeroU32>,
    /// A file that refers to the namespace, such as /run/netns/NAME
    #[arg(long, value_name = "PATH")]
    pub netns: Option<PathBuf>,
}

/// `landfall doctor`
#[derive(Debug, Args)]
pub struct DoctorArgs {
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

/// `landfall _engine`
#[derive(Debug, Args)]
pub struct EngineArgs {
    /// Path of the socket on which it listens for its driver.
    #[arg(long, value_name = "PATH")]
    pub socket: PathBuf,
}

/// `landfall _keeper`
#[derive(Debug, Args)]
pub struct KeeperArgs {
    /// A process in the sandbox.
    pub pid: u32,
}

/// The command of an inner process.
#[derive(Debug, Args)]
pub struct InnerArgs {
    /// The command and its arguments.
    #[arg(last = true)]
    pub command: Vec<OsString>,
}

/// The kernel interface that moves the bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Ring {
    /// io_uring if the kernel allows it, otherwise epoll.
    Auto,
    /// io_uring; it is an error if the kernel does not allow it.
    #[value(name = "io_uring")]
    IoUring,
    /// epoll.
    Epoll,
}

/// Outbound network of a sandbox.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Net {
    /// Loopback only.
    None,
    /// Through pasta; it is an error if pasta is missing or fails.
    Pasta,
    /// Through pasta if it is installed and works.
    Auto,
}

fn parse_name(text: &str) -> Result<String, String> {
    if crate::model::name::sanitise(text) == text {
        Ok(text.to_owned())
    } else {
        Err("a name starts with a letter or digit and consists of letters, digits, '_', '.' and '-'"
            .to_owned())
    }
}

fn parse_pid(text: &str) -> Result<NonZeroU32, String> {
    text.parse().map_err(|_| "a process id is a number from 1".to_owned())
}
