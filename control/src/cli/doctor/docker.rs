//! The Docker engine: which one is asked, whether it answers, and how its containers will be reached.

use std::os::unix::net::UnixStream;
use std::path::Path;

use nix::sys::socket::getsockopt;
use nix::sys::socket::sockopt::PeerCredentials;

use super::Finding;
use crate::docker::{About, Docker, DockerError};

const ENGINE: &str = "Docker engine";
const WAY: &str = "Docker containers";

/// What is found about the engine, about the way into its containers, and whether that is closed to a user to whom Docker is open.
pub(super) fn docker() -> (Finding, Finding, bool) {
    let unasked = || {
        Finding::lack(WAY, "not known, since no engine answers", "`run` and `attach --pid` need no Docker")
    };
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return (Finding::lack(ENGINE, error.to_string(), "see ulimit -n"), unasked(), false),
    };
    match runtime.block_on(Docker::from_environment().about()) {
        Ok(about) => {
            let owner = about.socket.as_deref().and_then(owner);
            let user = rustix::process::geteuid().as_raw();
            let is_closed = user != 0 && owner != Some(user);
            (engine(&about, owner), attach_method(&about, owner, user, &kernel()), is_closed)
        }
        Err(error) => (absent(&error), unasked(), false),
    }
}

/// The user that an engine runs as: rootless ones run as their user.
fn owner(socket: &Path) -> Option<u32> {
    let peer = UnixStream::connect(socket).ok()?;
    getsockopt(&peer, PeerCredentials).ok().map(|peer| peer.uid())
}

fn kernel() -> String {
    rustix::system::uname().release().to_string_lossy().into_owned()
}

fn engine(about: &About, owner: Option<u32>) -> Finding {
    let said_by = about.said_by.as_ref().map(|by| format!(" ({by})")).unwrap_or_default();
    let rootless = if owner.is_some_and(|owner| owner != 0) { ", rootless" } else { "" };
    Finding::ok(ENGINE, format!("{}{rootless}, at {}{said_by}", about.name, about.at))
}

/// How containers will be reached by user `user`, on this `kernel`.
fn attach_method(about: &About, owner: Option<u32>, user: u32, kernel: &str) -> Finding {
    if about.kernel.as_ref().is_some_and(|theirs| theirs != kernel) {
        return Finding::lack(
            WAY,
            "the engine runs on another kernel: on another machine, or in a virtual one",
            "run landfall there, or register containers by their WebSocket (landfall register --websocket)",
        );
    }
    match (user, owner) {
        (0, _) => Finding::ok(WAY, "entered by their namespaces, as root"),
        (user, Some(owner)) if user == owner => {
            Finding::ok(WAY, "entered by their namespaces, as the user that runs the engine")
        }
        _ => Finding::ok(
            WAY,
            "entered by root alone; for this user by a helper (see below) or by an agent inside",
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
            Finding::lack(ENGINE, format!("none at {at}"), "`run` and `attach --pid` need no Docker")
        }
        Some(Err(_)) => Finding::lack(ENGINE, detail, "join the group docker, or run as root"),
        Some(Ok(())) => Finding::lack(ENGINE, detail, "start the engine, or name another one by DOCKER_HOST"),
        None => Finding::lack(
            ENGINE,
            detail,
            "landfall works with an engine on this machine, named by DOCKER_HOST",
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
            said_by: Some("context rootless".to_owned()),
            socket: None,
            name: "Docker Engine 27.1".to_owned(),
            kernel: Some(kernel.to_owned()),
        }
    }

    #[test]
    fn an_engine_is_told_with_its_owner_and_with_who_named_it() {
        let told = engine(&about("6.1"), Some(1000)).detail;
        assert_eq!(
            told,
            "Docker Engine 27.1, rootless, at unix:///run/user/1000/docker.sock (context rootless)"
        );
        assert!(!engine(&about("6.1"), Some(0)).detail.contains("rootless,"));
    }

    #[test]
    fn the_way_in_follows_from_who_runs_what_where() {
        let state = |owner, user, kernel: &str| attach_method(&about(kernel), owner, user, "6.1").state;
        assert_eq!(state(Some(0), 0, "6.1"), State::Ok);
        assert_eq!(state(Some(1000), 1000, "6.1"), State::Ok);
        let detail = attach_method(&about("6.1"), Some(0), 1000, "6.1").detail;
        assert!(detail.contains("helper") && detail.contains("agent"), "{detail}");
        assert_eq!(state(Some(0), 0, "6.1-linuxkit"), State::Lack);
    }

    #[test]
    fn an_engine_that_is_not_there_is_told_with_what_to_do() {
        let nowhere =
            |at: &str| absent(&DockerError::Unreachable { at: at.to_owned(), reason: "no".to_owned() });
        assert_eq!(nowhere("unix:///no/such.sock").detail, "none at unix:///no/such.sock");
        assert!(nowhere("ssh://there (DOCKER_HOST)").hint.unwrap().contains("DOCKER_HOST"));
    }
}
