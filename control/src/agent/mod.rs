//! `landfall agent`: the program inside a container by which a host reaches what listens there, with no privilege at all.
//!
//! ```text
//!  host's daemon ── WebSocket, port 8973, broker token ──► server ──► connection ──► 127.0.0.1:PORT, or [::1]:PORT
//!  host's engine ── DIR/agent.sock, mounted ─────────────► the engine's own opener, on a thread: sockets, made in here
//!  programs beside it ── abstract Unix socket ───────────► local ──► hub ──► every host
//! ```
//!
//! - `server` answers HTTP and upgrades; `connection` is the shell around the session machine
//!   ([`crate::broker::container`]); `watch` reads what listens, `dial` connects.
//! - `hub` is what all connections share: reserved forwards, and who waits for them; `local` is how they are asked for.
//! - `hostd` asks the daemon on the host, for a program in the container.
//! - `directory` is the way by descriptors. Bytes on it never pass through here.
//! - `log` tells all of it, as JSON on standard error.
//!
//! It may be the first process of its container. The kernel then keeps from it every signal that it has not asked for
//! (`signal(7)`, `pid_namespaces(7)`), and makes it the parent of every orphan.

mod connection;
mod dial;
pub(crate) mod directory;
pub mod hostd;
mod hub;
pub mod local;
pub mod log;
mod refusals;
mod server;
mod watch;

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use landfall_engine::opener::serve;
use landfall_engine::process::raise_descriptor_limit;
use rustix::process::{WaitOptions, wait};
use thiserror::Error;
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::error::chain;
use crate::model::registration::{ContainerName, Token};
use directory::AgentSocket;
pub use directory::DirectoryError;
use hub::Hub;
use log::{AgentEvent, Log};
use server::{Bound, Settings};

pub use crate::model::port_policy::CONTAINER_PORT as PORT;
/// How often what listens is read (wire specification, A.3.5).
pub const INTERVAL: Duration = Duration::from_millis(500);

/// What an agent is started with.
#[derive(Clone, Debug)]
pub struct Options {
    /// Where hosts connect; every address of the container where none is named.
    pub address: Option<IpAddr>,
    /// At which port; 0 takes any free one.
    pub port: u16,
    /// The broker token, which a host presents or proves that it holds. If absent, the agent serves no WebSocket.
    pub token: Option<Token>,
    /// The container's own name, if known: challenges to another container are not answered.
    pub name: Option<ContainerName>,
    /// The directory that is shared with the host; where none is named, the usual one if it is mounted.
    pub directory: Option<PathBuf>,
    /// How often what listens is read.
    pub interval: Duration,
}

/// Why an agent did not start.
#[derive(Debug, Error)]
pub enum StartError {
    /// There is no way in which it could be of use.
    #[error("there is neither a broker token in the environment nor a directory shared with the host")]
    Useless,
    /// An address cannot be listened on.
    #[error("cannot listen on {address}")]
    Listen {
        /// Which.
        address: SocketAddr,
        /// Why.
        source: io::Error,
    },
    /// The directory that was named cannot be served.
    #[error(transparent)]
    Directory(#[from] DirectoryError),
    /// Signals cannot be waited for.
    #[error("signals cannot be waited for")]
    Signals(#[source] io::Error),
    /// A thread cannot be started.
    #[error("a thread cannot be started")]
    Thread(#[source] io::Error),
}

/// Serves until SIGTERM or SIGINT, then ends in order.
///
/// # Errors
/// [`StartError`]; then nothing of it is left.
pub async fn run(options: Options, log: Log) -> Result<(), StartError> {
    let mut signals = Signals::take().map_err(StartError::Signals)?;
    // Every stream holds a descriptor.
    raise_descriptor_limit();
    let door = open_door(&options, &log)?;
    if options.token.is_none() && door.is_none() {
        return Err(StartError::Useless);
    }
    let bound = Bound::listen(options.address, options.port)?;
    let asked = local::listen(bound.port());
    // What is told holds already: who starts something at the first word finds an agent that can be asked.
    bound.tell(&log);
    if options.token.is_none() {
        let text = "there is no broker token in the environment, so only the directory is served";
        log.tell(&AgentEvent::AgentNotice { text: text.to_owned() });
    }
    let hub = Hub::new();
    let has_token = options.token.is_some();
    match asked {
        Ok(listener) => drop(tokio::spawn(local::serve(listener, hub.clone(), has_token))),
        Err(error) => {
            let text = format!("programs in the container cannot ask for ports: {}", chain(&error));
            log.tell(&AgentEvent::AgentNotice { text });
        }
    }
    let settings = Settings {
        token: options.token,
        name: options.name,
        interval: options.interval,
        hub,
        log: log.clone(),
        refusals: Arc::default(),
    };
    let server = bound.serve(settings);
    signals.end().await;
    log.tell(&AgentEvent::AgentStopping);
    server.stop().await;
    if let Some((_door, listener)) = door {
        // Its thread ends with that; every host finds its channels closed.
        let _ = rustix::net::shutdown(&listener, rustix::net::Shutdown::Both);
    }
    log.close();
    Ok(())
}

/// Serves the directory, where there is one. One that was not named and cannot be served is none.
fn open_door(options: &Options, log: &Log) -> Result<Option<(AgentSocket, OwnedFd)>, StartError> {
    let named = options.directory.clone();
    let Some(path) = named.clone().or_else(|| directory::is_mounted().then(|| directory::DIRECTORY.into()))
    else {
        return Ok(None);
    };
    let (listener, door) = match directory::listen(&path) {
        Ok(opened) => opened,
        Err(error) if named.is_none() => {
            log.tell(&AgentEvent::AgentNotice { text: chain(&error) });
            return Ok(None);
        }
        Err(error) => return Err(error.into()),
    };
    let kept = listener.try_clone().map_err(StartError::Thread)?;
    let told = log.clone();
    let serving = move || {
        if let Err(error) = serve::agent(listener) {
            let text = format!("the directory is served no more: {}", chain(&error));
            told.tell(&AgentEvent::AgentNotice { text });
        }
    };
    thread::Builder::new().name("landfall-opener".to_owned()).spawn(serving).map_err(StartError::Thread)?;
    log.tell(&AgentEvent::AgentServing { directory: path });
    Ok(Some((door, kept)))
}

/// The signals that end it, and the one that tells of children.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
    child: Signal,
    is_first: bool,
}

impl Signals {
    fn take() -> io::Result<Signals> {
        Ok(Signals {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            child: signal(SignalKind::child())?,
            is_first: std::process::id() == 1,
        })
    }

    /// Returns when the agent is to end. It starts no process itself: what ends below the first process was an orphan.
    async fn end(&mut self) {
        loop {
            tokio::select! {
                _ = self.terminate.recv() => return,
                _ = self.interrupt.recv() => return,
                _ = self.child.recv() => {
                    while self.is_first && matches!(wait(WaitOptions::NOHANG), Ok(Some(_))) {}
                }
            }
        }
    }
}
