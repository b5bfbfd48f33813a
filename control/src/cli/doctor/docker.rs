//! Findings about the Docker engine: which one is configured, whether it answers, and how its containers will be
//! entered.

use std::os::unix::net::UnixStream;
use std::path::Path;

use nix::sys::socket::getsockopt;
use nix::sys::socket::sockopt::PeerCredentials;

use super::Finding;
use crate::docker::{About, Docker, DockerError};

const ENGINE: &str = "Docker engine";
const CONTAINERS: &str = "Docker containers";

/// Returns the findings about the engine and about the attach method of its containers, and whether this user can use
/// Docker but cannot enter its containers.
pub(super) fn docker() -> (Finding, Finding, bool) {
    let unasked = || {
        Finding::lack(
            CONTAINERS,
            "unknown, since no engine answers",
            "`run` and `attach --pid` need no Docker",
        )
    };
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return (Finding::lack(ENGINE, error.to_string(), "see ulimit -n"), unasked(), false),
    };
    match runtime.block_on(Docker::from_environment().about()) {
        Ok(about) => {
            let owner = about.socket.as_deref().and_then(owner);
            let user = rustix::process::geteuid().as_raw();
            let needs_helper = user != 0 && owner != Some(user);
            (engine(&about, owner), attach_method(&about, owner, user, &kernel()), needs_helper)
        }
        Err(error) => (absent(&error), unasked(), false),
    }
}

/// Returns the uid of the engine's process; a rootless engine runs as its user.
fn owner(socket: &Path) -> Option<u32> {
    let peer = UnixStream::connect(socket).ok()?;
    getsockopt(&peer, PeerCredentials).ok().map(|peer| peer.uid())
}

fn kernel() -> String {
    rustix::system::uname().release().to_string_lossy().into_owned()
}

fn engine(about: &About, owner: Option<u32>) -> Finding {
    let source = about.source.as_ref().map(|by| format!(" ({by})")).unwrap_or_default();
    let rootless = if owner.is_some_and(|owner| owner != 0) { ", rootless" } else { "" };
    Finding::ok(ENGINE, format!("{}{rootless}, at {}{source}", about.name, about.at))
}

/// Returns how user `user` can enter containers on this `kernel`.
fn attach_method(about: &About, owner: Option<u32>, user: u32, kernel: &str) -> Finding {
    if about.kernel.as_ref().is_some_and(|theirs| theirs != kernel) {
        return Finding::lack(
            CONTAINERS,
            "the engine runs on another kernel: another machine or a virtual machine",
            "run landfall there, or register containers with landfall register --websocket",
        );
    }
    match (user, owner) {
        (0, _) => Finding::ok(CONTAINERS, "entered through their namespaces, as root"),
        (user, Some(owner)) if user == owner => {
            Finding::ok(CONTAINERS, "entered through their namespaces, as the user that runs the engine")
        }
        _ => Finding::ok(
            CONTAINERS,
            "only root can enter them; this user needs a helper (see below) or an agent inside",
        ),
    }
}

fn absent(error: &DockerError) -> Finding {
    let DockerError::Unreachable { at, reason } = error else {
        return Finding::lack(ENGINE, error.to_string(), "see the engine's own log");
    };
    let detail = format!("{at}: {reason}");
    let path = at.strip_prefix("unix://").map(Path::new);
    match path.map(|path| rustix::fs::access(path, rustix::fs::Access::WRITE_OK)) {
        Some(Err(rustix::io::Errno::NOENT)) => {
            Finding::lack(ENGINE, format!("not found at {at}"), "`run` and `attach --pid` need no Docker")
        }
        Some(Err(_)) => Finding::lack(ENGINE, detail, "join the group docker, or run as root"),
        Some(Ok(())) => Finding::lack(ENGINE, detail, "start the engine, or set DOCKER_HOST to another one"),
        None => Finding::lack(
            ENGINE,
            detail,
            "landfall needs an engine on this machine; set DOCKER_HOST to its socket",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::super::State;
    use super::*;

    fn about(kernel: &str) -> About {
        About {
            at: "unix:///run/user/1000/docker.sock".to_owned(),
            source: Some("context rootless".to_owned()),
            socket: None,
            name: "Docker Engine 27.1".to_owned(),
            kernel: Some(kernel.to_owned()),
        }
    }

    #[test]
    fn an_engine_is_reported_with_its_owner_and_the_source_of_its_address() {
        let detail = engine(&about("6.1"), Some(1000)).detail;
        assert_eq!(
            detail,
            "Docker Engine 27.1, rootless, at unix:///run/user/1000/docker.sock (context rootless)"
        );
        assert!(!engine(&about("6.1"), Some(0)).detail.contains("rootless,"));
    }

    #[test]
    fn the_attach_method_depends_on_the_user_the_owner_and_the_kernel() {
        let state = |owner, user, kernel: &str| attach_method(&about(kernel), owner, user, "6.1").state;
        assert_eq!(state(Some(0), 0, "6.1"), State::Ok);
        assert_eq!(state(Some(1000), 1000, "6.1"), State::Ok);
        let detail = attach_method(&about("6.1"), Some(0), 1000, "6.1").detail;
        assert!(detail.contains("helper") && detail.contains("agent"), "{detail}");
        assert_eq!(state(Some(0), 0, "6.1-linuxkit"), State::Lack);
    }

    #[test]
    fn a_missing_engine_is_reported_with_a_hint() {
        let nowhere =
            |at: &str| absent(&DockerError::Unreachable { at: at.to_owned(), reason: "no".to_owned() });
        assert_eq!(nowhere("unix:///no/such.sock").detail, "not found at unix:///no/such.sock");
        assert!(nowhere("ssh://there (DOCKER_HOST)").hint.unwrap().contains("DOCKER_HOST"));
    }
}
