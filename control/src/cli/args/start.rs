//! The arguments of the verbs that are about folders.

use std::num::NonZeroU16;
use std::path::PathBuf;

use clap::Args;

use super::daemon::container_name;
use crate::model::port_policy::{Policy, PortForward, PortList};
use crate::model::registration::ContainerName;
use crate::model::size::ByteSize;

pub(super) const START_NOTES: &str = "\
The image is what --image names, else what the folder's devcontainer.json says, else it is built by
the folder's Dockerfile. Its own command runs, with the folder at /workspaces/NAME, and may ask to be
restarted: LANDFALL_HOSTD_SOCKET names a socket of the daemon that only this container has,
LANDFALL_HOSTD_URL its port, and LANDFALL_HOSTD_TOKEN holds the token. It has 3 s to end when it is
stopped. It may ask to be rebuilt only with --allow-rebuild. Its processes gain no privileges
(no-new-privileges), so sudo does not work in it; `docker exec -u root` does.

The container's environment holds its tokens. On the host, root and every user with the uid of a
process in the container can read them in /proc/PID/environ.

Example: landfall start ~/shop";

pub(super) const STOP_NOTES: &str = "\
Only a container that `landfall start` has made is stopped. It is removed; its volumes are kept, and
what `landfall grant` gave it, for the next one that is started from the folder.";

/// `landfall start`
#[derive(Debug, Args)]
pub struct StartArgs {
    /// The folder [default: this one]
    #[arg(value_name = "DIR")]
    pub folder: Option<PathBuf>,
    /// What the container is called [default: as the folder]
    #[arg(long, value_parser = container_name)]
    pub name: Option<ContainerName>,
    /// The image that it is made from
    #[arg(long)]
    pub image: Option<String>,
    /// Forward this port, too, whatever the folder says; may be repeated
    #[arg(long, value_name = "PORT", conflicts_with_all = ["allow", "deny"])]
    pub port: Vec<NonZeroU16>,
    /// Forward only these ports: 3000,8000-8100 or 80,* (below 1024 only what is named)
    #[arg(long, value_name = "PORTS")]
    pub allow: Option<PortList>,
    /// Never forward these ports
    #[arg(long, value_name = "PORTS")]
    pub deny: Option<PortList>,
    /// Send at most this much of the folder to a build, such as 4G [default: 1G]
    #[arg(long, value_name = "SIZE")]
    pub build_context_max: Option<ByteSize>,
    /// Let the container rebuild itself over HTTP, as `landfall grant NAME rebuild` does; its help says
    /// what that permits
    #[arg(long)]
    pub allow_rebuild: bool,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

impl StartArgs {
    /// The port policy, where one was asked for.
    pub fn policy(&self) -> Option<PortForward> {
        (self.allow.is_some() || self.deny.is_some()).then(|| {
            let deny = self.deny.clone().unwrap_or_default();
            PortForward::from(&Policy { allow: self.allow.clone(), deny })
        })
    }
}

/// `landfall stop`
#[derive(Debug, Args)]
pub struct StopArgs {
    /// The folder, or what its container is called [default: this folder]
    #[arg(value_name = "DIR|NAME")]
    pub what: Option<String>,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}
