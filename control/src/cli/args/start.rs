//! The arguments of the verbs that operate on folders.

use std::num::NonZeroU16;
use std::path::PathBuf;

use clap::Args;

use super::daemon::container_name;
use crate::model::port_policy::{Policy, PortForward, PortList};
use crate::model::registration::ContainerName;
use crate::model::size::ByteSize;

pub(super) const START_NOTES: &str = "\
The image is the one that --image names, or else the one that the folder's devcontainer.json names,
or else it is built from the folder's Dockerfile. The image's own command runs, with the folder
mounted at /workspaces/NAME. The container may request its restart: LANDFALL_HOSTD_SOCKET names a
daemon socket that only this container has, LANDFALL_HOSTD_URL the daemon's HTTP endpoint, and
LANDFALL_HOSTD_TOKEN holds the token. A stopped container has 3 s to end. It may request its
rebuild only with --allow-rebuild. Its processes cannot gain privileges (no-new-privileges), so
sudo does not work in it; `docker exec -u root` does.

The container's environment holds its tokens. On the host, root and every user with the uid of a
process in the container can read them in /proc/PID/environ.

Example: landfall start ~/shop";

pub(super) const STOP_NOTES: &str = "\
Only a container that `landfall start` has created is stopped. It is removed; its volumes are kept,
and so are its grants, for the next container that is started from the folder.";

/// `landfall start`
#[derive(Debug, Args)]
pub struct StartArgs {
    /// The folder [default: the current folder]
    #[arg(value_name = "DIR")]
    pub folder: Option<PathBuf>,
    /// The name of the container [default: the name of the folder]
    #[arg(long, value_parser = container_name)]
    pub name: Option<ContainerName>,
    /// The image of the container
    #[arg(long)]
    pub image: Option<String>,
    /// Also forward this port, even if the folder's files do not; may be repeated
    #[arg(long, value_name = "PORT", conflicts_with_all = ["allow", "deny"])]
    pub port: Vec<NonZeroU16>,
    /// Forward only these ports: 3000,8000-8100 or 80,* (ports below 1024 only if named)
    #[arg(long, value_name = "PORTS")]
    pub allow: Option<PortList>,
    /// Never forward these ports
    #[arg(long, value_name = "PORTS")]
    pub deny: Option<PortList>,
    /// Largest folder to send to a build, such as 4G [default: 1G]
    #[arg(long, value_name = "SIZE")]
    pub build_context_max: Option<ByteSize>,
    /// Let the container rebuild itself over HTTP, as `landfall grant NAME rebuild` does; see `landfall grant --help`
    /// for what this permits
    #[arg(long)]
    pub allow_rebuild: bool,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

impl StartArgs {
    /// Returns the port policy of the command line, if it has one.
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
    /// The folder, or the name of its container [default: the current folder]
    #[arg(value_name = "DIR|NAME")]
    pub what: Option<String>,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}
