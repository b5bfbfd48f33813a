//! `landfall agent`: the program inside a container that makes its ports reachable for a host, without privileges.
//!
//! ```text
//!  host's daemon ── WebSocket, port 8973, broker token ──► server ──► connection ──► 127.0.0.1:PORT, or [::1]:PORT
//! !
//! //!  host's engine ── DIR/agent.sock, mounted ─────────────► the engine's own opener, on a thread: sockets, created
//! here
//! !
//! //!  other programs ── abstract Unix socket ───────────────► local ──► hub ──► every host
//! ```
//!
//! - `server` answers HTTP and upgrades; `connection` is the I/O shell around the session machine
//!   ([`crate::broker::container`]); `watch` reads listeners, `dial` connects.
//! - `hub` is the state that all connections share: reserved forwards, and the programs that wait for them; `local` is
//!   the interface for these programs.
//! - `hostd` sends requests of a program in the container to the daemon on the host.
//! - `directory` passes descriptors to the host. Payload of these connections never passes through the agent.
//! - `log` writes events as JSON to standard error.
//!
//! An agent starts, serves until SIGTERM or SIGINT, and stops in an orderly way. It never enters another namespace, and
//! never forwards a port before a host has authenticated.
//!
//! It may be the first process of its container. The kernel then delivers only signals for which it has handlers
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
/// The interval between readings of the listeners (wire specification, A.3.5).
pub const INTERVAL: Duration = Duration::from_millis(500);

/// The options of an agent.
#[derive(Clone, Debug)]
pub struct Options {
    /// The address for hosts; all addresses of the container if absent.
    pub address: Option<IpAddr>,
    /// The port for hosts; 0 picks a free port.
    pub port: u16,
    /// The broker token, which a host sends or proves that it holds. If absent, the agent serves no WebSocket.
    pub token: Option<Token>,
    /// The container's own name, if known: challenges to another container are not answered.
    pub name: Option<ContainerName>,
    /// The directory that is shared with the host; if absent, the default directory if it is mounted.
    pub directory: Option<PathBuf>,
    /// The interval between readings of the listeners.
    pub interval: Duration,
}

/// The reason why an agent did not start.
#[derive(Debug, Error)]
pub enum StartError {
    /// Neither a WebSocket nor a directory can be served.
    #[error("there is neither a broker token in the environment nor a directory shared with the host")]
    Useless,
    /// Listening on an address failed.
    #[error("cannot listen on {address}")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// The error.
        source: io::Error,
    },
    /// The given directory cannot be served.
    #[error(transparent)]
    Directory(#[from] DirectoryError),
    /// The signal handlers cannot be installed.
    #[error("cannot install signal handlers")]
    Signals(#[source] io::Error),
    /// A thread cannot be started.
    #[error("cannot start a thread")]
    Thread(#[source] io::Error),
}

/// Serves until SIGTERM or SIGINT, then stops in an orderly way.
///
/// # Errors
/// [`StartError`]; in this case no socket remains.
pub async fn run(options: Options, log: Log) -> Result<(), StartError> {
    let mut signals = Signals::take().map_err(StartError::Signals)?;
    // Every stream holds a descriptor.
    raise_descriptor_limit();
    let agent_socket = serve_directory(&options, &log)?;
    if options.token.is_none() && agent_socket.is_none() {
        return Err(StartError::Useless);
    }
    let bound = Bound::listen(options.address, options.port)?;
    let asked = local::listen(bound.port());
    // The address is logged after all sockets are bound, so that a program that starts on this line can send requests.
    bound.record(&log);
    if options.token.is_none() {
        let text = "there is no broker token in the environment, so only the directory is served";
        log.record(&AgentEvent::AgentNotice { text: text.to_owned() });
    }
    let hub = Hub::new();
    let has_token = options.token.is_some();
    match asked {
        Ok(listener) => drop(tokio::spawn(local::serve(listener, hub.clone(), has_token))),
        Err(error) => {
            let text = format!("programs in the container cannot request ports: {}", chain(&error));
            log.record(&AgentEvent::AgentNotice { text });
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
    log.record(&AgentEvent::AgentStopping);
    server.stop().await;
    if let Some((_door, listener)) = agent_socket {
        // This ends the opener's thread; every host finds its channels closed.
        let _ = rustix::net::shutdown(&listener, rustix::net::Shutdown::Both);
    }
    log.close();
    Ok(())
}

/// Serves the directory, if there is one. An error is returned only for a directory that was given explicitly.
fn serve_directory(options: &Options, log: &Log) -> Result<Option<(AgentSocket, OwnedFd)>, StartError> {
    let named = options.directory.clone();
    let Some(path) = named.clone().or_else(|| directory::is_mounted().then(|| directory::DIRECTORY.into()))
    else {
        return Ok(None);
    };
    let (listener, agent_socket) = match directory::listen(&path) {
        Ok(opened) => opened,
        Err(error) if named.is_none() => {
            log.record(&AgentEvent::AgentNotice { text: chain(&error) });
            return Ok(None);
        }
        Err(error) => return Err(error.into()),
    };
    let kept = listener.try_clone().map_err(StartError::Thread)?;
    let told = log.clone();
    let serving = move || {
        if let Err(error) = serve::agent(listener) {
            let text = format!("the directory is no longer served: {}", chain(&error));
            told.record(&AgentEvent::AgentNotice { text });
        }
    };
    thread::Builder::new().name("landfall-opener".to_owned()).spawn(serving).map_err(StartError::Thread)?;
    log.record(&AgentEvent::AgentServing { directory: path });
    Ok(Some((agent_socket, kept)))
}

/// The signals that end the agent, and SIGCHLD.
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

    /// Waits for a signal to end. As the first process, it reaps children meanwhile: the agent starts no processes, so
    /// all of them are orphans.
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
