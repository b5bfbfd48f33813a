//! The arguments, and nothing but them. Help texts are the first documentation people meet.

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

/// What listens in a container answers on the host's localhost.
#[derive(Debug, Parser)]
#[command(name = "landfall", version, max_term_width = 100, after_help = EXIT_CODES)]
#[command(disable_help_subcommand = true, arg_required_else_help = true)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub verb: Verb,
}

const EXIT_CODES: &str = "\
Exit codes:
  0        done as asked; the exit code of the command after `run`
  1        `doctor`: forwarding does not work here
  2        the command line makes no sense
  3        no such container, process or namespace
  4        not permitted
  5        no daemon runs, or none could be started or reached
  6        the daemon refused, or what it was asked for failed
  124      `agent forward`: no answer in time
  125      landfall itself failed
  126/127  `run`: the command cannot be executed / does not exist
  128+N    `run`: the command was ended by signal N";

const RUN_NOTES: &str = "\
The command has its standard streams, its signals and its exit code as if it were started without
landfall. What landfall itself has to say goes to standard error, with --json as well. When the
command ends, so does what it left running in its network: nobody could reach that any more.

It isolates the network and the user namespace (as root, where that is forbidden, the network
alone), not files or processes: the command runs as you, and ~/.bashrc, docker.sock (which is root)
and the daemon's hostd.sock are in its reach. Run code that you do not trust in a container.

With native sockets (--sockets auto, the default, or native) a server listens on the host's
localhost itself, and is as fast as outside. It then holds a socket of the host's network: a
malicious program can use it to connect to any service on the host's localhost. --net none and
--sockets relay keep the command in its own network. --sockets relay is also for programs that
native sockets do not suit, and for several worktrees on one port. LANDFALL_SOCKETS sets the
default.

Example: landfall run -- npm run dev";

const ATTACH_NOTES: &str = "\
A container is forwarded by the daemon, from now on and whenever it runs, also when it is made anew
under its name. Containers whose label dev.landfall.forward is true need no attach.

Example: landfall attach shop";

const UP_NOTES: &str = "\
The daemon keeps what it keeps in $LANDFALL_HOME, else $TYPECLAW_HOME, else ~/.landfall: its socket in run/,
its registrations in run/registrations/, its log in log/. There is one daemon for each of them.";

const REGISTER_NOTES: &str = "\
Without a way in (--pid, --netns, --docker, --agent, --websocket) the container is only remembered, as
one that a client of the reference registers. It may then rebuild itself: see landfall grant --help.

Tokens are taken from files or from the environment, never from the command line, which everybody on
the machine can read.

Example: landfall register shop --docker --allow 3000,5173";

/// The verbs. Those that begin with `_` are how landfall starts parts of itself.
#[derive(Debug, Subcommand)]
pub enum Verb {
    /// Run a command in a network of its own; what it listens on answers on localhost
    #[command(after_help = RUN_NOTES)]
    Run(RunArgs),
    /// Forward what listens in a container of Docker's, or in a network namespace that exists already
    #[command(after_help = ATTACH_NOTES)]
    Attach(AttachArgs),
    /// Forward a container of Docker's no longer, whatever its labels say
    Detach(DetachArgs),
    /// Tell what this machine allows, and whether forwarding works
    Doctor(DoctorArgs),
    /// Start the daemon, or replace one of another build; it remembers containers and forwards them
    #[command(after_help = UP_NOTES)]
    Up(UpArgs),
    /// Stop the daemon and its relay engine; what is registered is remembered
    Down(PlainArgs),
    /// Tell how the daemon is, or one container
    Status(StatusArgs),
    /// List what is registered and what is forwarded
    #[command(visible_alias = "list")]
    Ls(LsArgs),
    /// Have the daemon remember a container and forward what listens in it
    #[command(after_help = REGISTER_NOTES)]
    Register(RegisterArgs),
    /// Have the daemon forget a container, and what was granted to it
    Deregister(DeregisterArgs),
    /// Let a container do more than act for itself, such as rebuild its image
    #[command(after_help = daemon::GRANT_NOTES)]
    Grant(GrantArgs),
    /// Take back what `grant` gave
    Revoke(RevokeArgs),
    /// Have the daemon stop and start a container
    Restart(RestartArgs),
    /// Make a container of a folder and run it; what listens in it answers on localhost
    #[command(after_help = start::START_NOTES)]
    Start(StartArgs),
    /// Stop and remove what `start` has made
    #[command(after_help = start::STOP_NOTES)]
    Stop(StopArgs),
    /// Approve what the files of a folder ask for: commands, secrets, ports below 1024
    #[command(after_help = trust::TRUST_NOTES)]
    Trust(TrustArgs),
    /// Tell what happens in the daemon, as it happens
    Events(EventsArgs),
    /// Tell what has happened in the daemon
    Logs(LogsArgs),
    /// Tell which build this is, and which one the daemon is
    Version(PlainArgs),
    /// Inside a container: have a host reach what listens here, without any privilege
    #[command(after_help = agent::AGENT_NOTES)]
    Agent(AgentArgs),
    /// The inner process of a sandbox
    #[command(name = "_sandbox", hide = true)]
    Sandbox(InnerArgs),
    /// The daemon
    #[command(name = "_hostd", hide = true)]
    Hostd(DaemonArgs),
    /// Keeps the capabilities of a root daemon
    #[command(name = "_launcher", hide = true)]
    Launcher(LauncherArgs),
    /// The engine, driven over a socket
    #[command(name = "_engine", hide = true)]
    Engine(EngineArgs),
    /// Makes sockets inside a namespace
    #[command(name = "_opener", hide = true)]
    Opener,
    /// Starts openers for a user, inside the helper's container
    #[command(name = "_helper", hide = true)]
    Helper(HelperArgs),
    /// A program that ends with the process that started it
    #[command(name = "_tied", hide = true)]
    Tied(InnerArgs),
    /// Ends a sandbox when landfall dies
    #[command(name = "_keeper", hide = true)]
    Keeper(KeeperArgs),
}

impl Verb {
    /// Whether errors are told as JSON.
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

/// What `run` and `attach` share.
#[derive(Debug, Args)]
pub struct Common {
    /// Name to show for this namespace
    #[arg(long, value_parser = parse_name)]
    pub name: Option<String>,
    /// Forward only these ports: 3000,8000-8100 or 80,* (below 1024 only what is named)
    #[arg(long, value_name = "PORTS")]
    pub allow: Option<PortList>,
    /// Never forward these ports
    #[arg(long, value_name = "PORTS")]
    pub deny: Option<PortList>,
    /// How bytes are moved
    #[arg(long, value_enum, default_value_t = Ring::Auto)]
    pub ring: Ring,
    /// Forward by an engine of its own, even where a daemon runs; so does a --ring
    #[arg(long)]
    pub no_daemon: bool,
    /// Tell what happens as JSON, one object a line
    #[arg(long)]
    pub json: bool,
}

impl Common {
    /// The port policy that was asked for.
    pub fn policy(&self) -> Policy {
        Policy { allow: self.allow.clone(), deny: self.deny.clone().unwrap_or_default() }
    }
}

/// `landfall run`
#[derive(Debug, Args)]
pub struct RunArgs {
    /// What `attach` has, too.
    #[command(flatten)]
    pub common: Common,
    /// How the command reaches the world: through pasta, if it is installed; or not at all
    #[arg(long, value_enum, default_value_t = Net::Auto)]
    pub net: Net,
    /// How its servers listen: on sockets of the host, without a relay; or through the relay [default: auto]
    #[arg(long, value_enum)]
    pub sockets: Option<Sockets>,
    /// Outcome when a server's port is in use on the host [default: `fail` where another program has it, `relay` where another
    /// container has it]
    #[arg(long, value_enum)]
    pub on_conflict: Option<OnConflict>,
    /// The command and its arguments
    #[arg(required = true, last = true, value_name = "COMMAND")]
    pub command: Vec<OsString>,
}

/// `landfall attach`
#[derive(Debug, Args)]
pub struct AttachArgs {
    /// Whose namespaces.
    #[command(flatten)]
    pub target: TargetArgs,
    /// What `run` has, too.
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
    /// A container, as Docker calls it; the daemon remembers it until `detach`
    #[arg(value_name = "NAME", value_parser = daemon::container_name)]
    pub container: Option<ContainerName>,
    /// A process that is in the namespace
    #[arg(long, value_parser = parse_pid)]
    pub pid: Option<NonZeroU32>,
    /// A file that stands for the namespace, such as /run/netns/NAME
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
    /// Where it listens for its driver.
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

/// Which ring moves the bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Ring {
    /// io_uring where the kernel allows it, else epoll.
    Auto,
    /// io_uring or nothing.
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
    /// Through pasta, or it is an error.
    Pasta,
    /// Through pasta where it is installed and works.
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
