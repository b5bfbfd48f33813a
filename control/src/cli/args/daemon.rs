//! The arguments of the verbs that start, stop or query the daemon.

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

/// The options that `up` passes on to the daemon.
#[derive(Clone, Debug, Default, Args)]
pub struct DaemonArgs {
    /// Port on which containers reach the daemon over HTTP; 0 picks a free port [default: 8974]
    #[arg(long, value_name = "PORT")]
    pub http_port: Option<u16>,
    /// Additional address to listen on for containers, besides 127.0.0.1; may be repeated [default: Docker's bridge]
    #[arg(long, value_name = "ADDRESS")]
    pub http_bind: Vec<IpAddr>,
    /// Refuse every request to restart a container
    #[arg(long)]
    pub no_restart: bool,
    /// Forward all Docker containers, except those whose label dev.landfall.forward is false
    #[arg(long)]
    pub all: bool,
    /// Serve forwarded ports on your tailnet, too, under the same numbers (tailscale serve)
    #[arg(long)]
    pub tailscale: bool,
    /// Largest folder to send to a build, such as 4G [default: 1G]
    #[arg(long, value_name = "SIZE")]
    pub build_context_max: Option<ByteSize>,
    /// Enter containers through a privileged helper container, for users without root who can use Docker
    #[arg(long)]
    pub docker_helper: bool,
    /// Default of `run --sockets`: auto, native or relay [default: auto]
    #[arg(long, value_enum, hide_possible_values = true)]
    pub sockets: Option<Sockets>,
}

impl DaemonArgs {
    /// Returns these options as command-line arguments.
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
    /// The options of the daemon.
    #[command(flatten)]
    pub daemon: DaemonArgs,
    /// Run as the daemon instead of starting it, for a supervisor such as systemd
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
    /// The uid of the user whose requests it accepts
    pub user: u32,
    /// Directory of its socket
    #[arg(long, value_name = "DIR", default_value = AGENT_DIRECTORY)]
    pub directory: PathBuf,
}

/// The arguments of a verb whose only option is `--json`.
#[derive(Debug, Args)]
pub struct PlainArgs {
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

/// `landfall ls`
#[derive(Debug, Args)]
pub struct LsArgs {
    /// List all Docker containers, each with the reason why it is forwarded or not
    #[arg(long)]
    pub all: bool,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

/// `landfall detach`
#[derive(Debug, Args)]
pub struct DetachArgs {
    /// The container
    pub name: String,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

/// `landfall status`
#[derive(Debug, Args)]
pub struct StatusArgs {
    /// Show one container, in detail
    pub name: Option<String>,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

/// `landfall register`
#[derive(Debug, Args)]
pub struct RegisterArgs {
    /// The name of the container; for a Docker container, its name in Docker
    #[arg(value_parser = container_name)]
    pub name: ContainerName,
    /// Its folder on the host [default: the current folder]
    #[arg(long, value_name = "DIR")]
    pub cwd: Option<PathBuf>,
    /// The attach method.
    #[command(flatten)]
    pub attach_method: AttachMethodArgs,
    /// Forward only these ports: 3000,8000-8100 or 80,* (ports below 1024 only if named)
    #[arg(long, value_name = "PORTS")]
    pub allow: Option<PortList>,
    /// Never forward these ports
    #[arg(long, value_name = "PORTS")]
    pub deny: Option<PortList>,
    /// Host port on which Docker publishes port 8973 of the container
    #[arg(long, value_name = "PORT")]
    pub ws_host_port: Option<NonZeroU16>,
    /// File with the token with which the container may request its restart; or set LANDFALL_RESTART_TOKEN
    #[arg(long, value_name = "FILE")]
    pub restart_token_file: Option<PathBuf>,
    /// File with the token that the daemon presents to the container; or set LANDFALL_BROKER_TOKEN
    #[arg(long, value_name = "FILE")]
    pub broker_token_file: Option<PathBuf>,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

impl RegisterArgs {
    /// Returns the port policy of the command line, if it has one.
    pub fn options(&self) -> Option<PortForward> {
        (self.allow.is_some() || self.deny.is_some()).then(|| {
            let deny = self.deny.clone().unwrap_or_default();
            PortForward::from(&Policy { allow: self.allow.clone(), deny })
        })
    }

    /// Returns the default port policy if neither the command line nor the folder has one. `--websocket` requires a policy.
    pub fn default_policy(&self) -> Option<PortForward> {
        self.attach_method.websocket.then(PortForward::default)
    }
}

/// At most one attach method.
#[derive(Debug, Args)]
#[group(required = false, multiple = false)]
pub struct AttachMethodArgs {
    /// Through a process inside it; the registration ends with that process
    #[arg(long, value_parser = super::parse_pid)]
    pub pid: Option<NonZeroU32>,
    /// Through a file that refers to its network namespace, such as /run/netns/NAME
    #[arg(long, value_name = "PATH")]
    pub netns: Option<PathBuf>,
    /// Through Docker, which has a container of this name
    #[arg(long)]
    pub docker: bool,
    /// Through an agent inside it, whose socket is in this directory shared with the host
    #[arg(long, value_name = "DIR")]
    pub agent: Option<PathBuf>,
    /// Through its WebSocket only; needs --ws-host-port and a broker token
    #[arg(long)]
    pub websocket: bool,
}

/// `landfall deregister`
#[derive(Debug, Args)]
pub struct DeregisterArgs {
    /// The container
    pub name: String,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

pub(super) const GRANT_NOTES: &str = "\
Rights:
  rebuild  The container may request its own rebuild, over HTTP and with its own token: the daemon
           builds an image named landfall-NAME from the container's folder, and recreates the
           container from that image. It keeps its user, capabilities, security options, mounts
           and limits.

A container that can write to its folder chooses the Dockerfile, so `rebuild` permits more than a
new image:
  - The build has access to your image store: it can copy files out of every image on this machine
    (FROM, COPY --from), and pull other images.
  - Its RUN steps run as root in a build container, on Docker's default network, without the limits
    of the container, for up to 30 minutes.
  - The whole folder is sent to the build, including parts that are not mounted.
  - Each build takes disk space.
  - A set-uid program in the new image can give a process root inside the container, unless the
    container has no-new-privileges.

A grant belongs to the container's name and to the folder that is registered now; if another folder
is registered, the grant is dormant. It outlives the container and its registration; `revoke` and
`deregister` remove it.

Example: landfall grant shop rebuild";

/// `landfall grant`
#[derive(Debug, Args)]
pub struct GrantArgs {
    /// The container, under its registered name
    pub name: String,
    /// The rights, from the list below
    #[arg(required = true, value_name = "RIGHT")]
    pub rights: Vec<Right>,
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
    #[arg(required = true, value_name = "RIGHT")]
    pub rights: Vec<String>,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

/// `landfall restart`
#[derive(Debug, Args)]
pub struct RestartArgs {
    /// The container
    pub name: String,
    /// First build the image landfall-NAME from its folder; the container takes the user of that image
    #[arg(long)]
    pub build: bool,
    /// Return at once, without the outcome
    #[arg(long)]
    pub no_wait: bool,
    /// How long to wait for the outcome, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 600, conflicts_with = "no_wait")]
    pub wait: u64,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

/// `landfall events`
#[derive(Debug, Args)]
pub struct EventsArgs {
    /// Only events of this container
    #[arg(long, value_name = "NAME")]
    pub container: Option<String>,
    /// Print each event as one JSON object per line
    #[arg(long)]
    pub json: bool,
}

/// `landfall logs`
#[derive(Debug, Args)]
pub struct LogsArgs {
    /// Keep printing lines as they are written
    #[arg(short, long)]
    pub follow: bool,
    /// How many of the existing lines to print
    #[arg(short = 'n', long, value_name = "COUNT", default_value_t = 50)]
    pub lines: usize,
    /// Print the lines unchanged, one JSON object each
    #[arg(long)]
    pub json: bool,
}

pub(super) fn container_name(text: &str) -> Result<ContainerName, String> {
    ContainerName::new(text).map_err(|_| {
        "a name starts with a letter or digit and consists of at most 200 letters, digits, '_', '.' and '-'".to_owned()
    })
}
