//! The arguments of the verbs that are about the daemon.

use std::ffi::OsString;
use std::net::IpAddr;
use std::num::{NonZeroU16, NonZeroU32};
use std::path::PathBuf;

use clap::Args;

use crate::daemon::rpc::ensure::{ALL, DOCKER_HELPER, SOCKETS, TAILSCALE};
use crate::docker::AGENT_DIRECTORY;
use crate::model::grants::Right;
use crate::model::native_sockets::Sockets;
use crate::model::port_policy::{Policy, PortForward, PortList};
use crate::model::registration::ContainerName;
use crate::model::size::ByteSize;

/// What `up` passes on to the daemon that it starts.
#[derive(Clone, Debug, Default, Args)]
pub struct DaemonArgs {
    /// Where containers reach the daemon by HTTP; 0 takes any free port [default: 8974]
    #[arg(long, value_name = "PORT")]
    pub http_port: Option<u16>,
    /// Address to listen on for them beside 127.0.0.1; may be repeated [default: Docker's bridge]
    #[arg(long, value_name = "ADDRESS")]
    pub http_bind: Vec<IpAddr>,
    /// Restart no container, whoever asks
    #[arg(long)]
    pub no_restart: bool,
    /// Forward every container of Docker's, but those whose label dev.landfall.forward is false
    #[arg(long)]
    pub all: bool,
    /// Serve what is forwarded on your tailnet, too, at the same port (tailscale serve)
    #[arg(long)]
    pub tailscale: bool,
    /// Send at most this much of a folder to a build, such as 4G [default: 1G]
    #[arg(long, value_name = "SIZE")]
    pub build_context_max: Option<ByteSize>,
    /// Enter containers by a helper container that may, where you are not root but may use Docker
    #[arg(long)]
    pub docker_helper: bool,
    /// Default of `run --sockets`: auto, native or relay [default: auto]
    #[arg(long, value_enum, hide_possible_values = true)]
    pub sockets: Option<Sockets>,
}

impl DaemonArgs {
    /// The same as words of a command line.
    pub fn words(&self) -> Vec<OsString> {
        let mut words: Vec<OsString> = Vec::new();
        if let Some(port) = self.http_port {
            words.extend(["--http-port".into(), port.to_string().into()]);
        }
        for address in &self.http_bind {
            words.extend(["--http-bind".into(), address.to_string().into()]);
        }
        if self.no_restart {
            words.push("--no-restart".into());
        }
        if self.all {
            words.push(ALL.into());
        }
        if self.tailscale {
            words.push(TAILSCALE.into());
        }
        if let Some(size) = self.build_context_max {
            words.extend(["--build-context-max".into(), size.0.to_string().into()]);
        }
        if self.docker_helper {
            words.push(DOCKER_HELPER.into());
        }
        if let Some(sockets) = self.sockets {
            words.extend([SOCKETS.into(), sockets.as_str().into()]);
        }
        words
    }
}

/// `landfall up`
#[derive(Debug, Args)]
pub struct UpArgs {
    /// What the daemon takes, too.
    #[command(flatten)]
    pub daemon: DaemonArgs,
    /// Become the daemon instead of starting it, for a supervisor such as systemd
    #[arg(long)]
    pub foreground: bool,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

/// `landfall _launcher`
#[derive(Debug, Args)]
pub struct LauncherArgs {
    /// The daemon's home
    #[arg(long, value_name = "DIR")]
    pub home: PathBuf,
}

/// `landfall _helper`
#[derive(Debug, Args)]
pub struct HelperArgs {
    /// Whom it obeys, by the number of the user
    pub user: u32,
    /// Where its socket is to be
    #[arg(long, value_name = "DIR", default_value = AGENT_DIRECTORY)]
    pub directory: PathBuf,
}

/// A verb that takes nothing but `--json`.
#[derive(Debug, Args)]
pub struct PlainArgs {
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

/// `landfall ls`
#[derive(Debug, Args)]
pub struct LsArgs {
    /// List every container that Docker has, and why it is forwarded or not
    #[arg(long)]
    pub all: bool,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

/// `landfall detach`
#[derive(Debug, Args)]
pub struct DetachArgs {
    /// Which container
    pub name: String,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

/// `landfall status`
#[derive(Debug, Args)]
pub struct StatusArgs {
    /// One container, in detail
    pub name: Option<String>,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

/// `landfall register`
#[derive(Debug, Args)]
pub struct RegisterArgs {
    /// What the container is called; where Docker runs it, its name there
    #[arg(value_parser = container_name)]
    pub name: ContainerName,
    /// Its folder on the host [default: this one]
    #[arg(long, value_name = "DIR")]
    pub cwd: Option<PathBuf>,
    /// How it is reached.
    #[command(flatten)]
    pub attach_method: AttachMethodArgs,
    /// Forward only these ports: 3000,8000-8100 or 80,* (below 1024 only what is named)
    #[arg(long, value_name = "PORTS")]
    pub allow: Option<PortList>,
    /// Never forward these ports
    #[arg(long, value_name = "PORTS")]
    pub deny: Option<PortList>,
    /// Host port on which Docker publishes its port 8973
    #[arg(long, value_name = "PORT")]
    pub ws_host_port: Option<NonZeroU16>,
    /// File with the token by which it may ask to be restarted, or LANDFALL_RESTART_TOKEN
    #[arg(long, value_name = "FILE")]
    pub restart_token_file: Option<PathBuf>,
    /// File with the token that the daemon presents to it, or LANDFALL_BROKER_TOKEN
    #[arg(long, value_name = "FILE")]
    pub broker_token_file: Option<PathBuf>,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

impl RegisterArgs {
    /// The port policy of the command line, where there is one.
    pub fn options(&self) -> Option<PortForward> {
        (self.allow.is_some() || self.deny.is_some()).then(|| {
            let deny = self.deny.clone().unwrap_or_default();
            PortForward::from(&Policy { allow: self.allow.clone(), deny })
        })
    }

    /// The port policy where neither the command line nor the folder has one: a WebSocket needs one.
    pub fn default_policy(&self) -> Option<PortForward> {
        self.attach_method.websocket.then(PortForward::default)
    }
}

/// At most one way into the container.
#[derive(Debug, Args)]
#[group(required = false, multiple = false)]
pub struct AttachMethodArgs {
    /// By a process that is in it; the registration ends with that process
    #[arg(long, value_parser = super::parse_pid)]
    pub pid: Option<NonZeroU32>,
    /// By a file that stands for its network namespace, such as /run/netns/NAME
    #[arg(long, value_name = "PATH")]
    pub netns: Option<PathBuf>,
    /// By Docker, which knows a container of this name
    #[arg(long)]
    pub docker: bool,
    /// By an agent inside it, whose socket is in this directory of the host that both see
    #[arg(long, value_name = "DIR")]
    pub agent: Option<PathBuf>,
    /// By its WebSocket alone: --ws-host-port and a broker token say where and as whom
    #[arg(long)]
    pub websocket: bool,
}

/// `landfall deregister`
#[derive(Debug, Args)]
pub struct DeregisterArgs {
    /// Which container
    pub name: String,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

pub(super) const GRANT_NOTES: &str = "\
Rights:
  rebuild  The container may ask, over HTTP and with its own token, to be rebuilt: an image named
           landfall-NAME is built from its folder, and the container is recreated from that image.
           It keeps its user, capabilities, security options, mounts and limits.

A container that can write to its folder chooses the Dockerfile, so `rebuild` gives it more than a
new image of its own:
  - The build has your image store: it can copy files out of every image on this machine (FROM,
    COPY --from), and pull others.
  - Its RUN steps are root in a build container, on Docker's default network, without the limits of
    the container, for up to 30 minutes.
  - The whole folder is sent to it, also the part that is not mounted.
  - Each build takes disk space.
  - A set-uid program in the new image makes a process root in the container, unless the container
    has no-new-privileges.

A grant belongs to the name and to the folder that is registered now; with another folder it is
dormant. It outlives the container and its registration; `revoke` and `deregister` remove it.

Example: landfall grant shop rebuild";

/// `landfall grant`
#[derive(Debug, Args)]
pub struct GrantArgs {
    /// The container, as it is registered
    pub name: String,
    /// The rights, from the list below
    #[arg(required = true)]
    pub what: Vec<Right>,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

/// `landfall revoke`
#[derive(Debug, Args)]
pub struct RevokeArgs {
    /// The container, registered or not
    #[arg(value_parser = container_name)]
    pub name: ContainerName,
    /// The rights, as `landfall status NAME` shows them
    #[arg(required = true)]
    pub what: Vec<String>,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

/// `landfall restart`
#[derive(Debug, Args)]
pub struct RestartArgs {
    /// Which container
    pub name: String,
    /// First build the image landfall-NAME from its folder; the container takes the user of that image
    #[arg(long)]
    pub build: bool,
    /// Do not wait for what comes of it
    #[arg(long)]
    pub no_wait: bool,
    /// How long to wait for that, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 600, conflicts_with = "no_wait")]
    pub wait: u64,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

/// `landfall events`
#[derive(Debug, Args)]
pub struct EventsArgs {
    /// Only what happens to this one
    #[arg(long, value_name = "NAME")]
    pub container: Option<String>,
    /// Print each as it comes, one JSON object a line
    #[arg(long)]
    pub json: bool,
}

/// `landfall logs`
#[derive(Debug, Args)]
pub struct LogsArgs {
    /// Go on with what is written from now on
    #[arg(short, long)]
    pub follow: bool,
    /// How many lines of what is there
    #[arg(short = 'n', long, value_name = "COUNT", default_value_t = 50)]
    pub lines: usize,
    /// Print the lines as they are, one JSON object each
    #[arg(long)]
    pub json: bool,
}

pub(super) fn container_name(text: &str) -> Result<ContainerName, String> {
    ContainerName::new(text).map_err(|_| {
        "a name starts with a letter or digit and consists of at most 200 letters, digits, '_', '.' and '-'".to_owned()
    })
}
