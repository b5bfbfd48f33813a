//! The daemon: `landfall _hostd`.
//!
//! The daemon owns the registrations, answers RPC requests of the command line and of containers, and drives the engine. The
//! engine is a process of its own and outlives the daemon. The daemon is starting, serving or stopping: `start` and
//! `Daemon::stop` hold the whole order of these steps, which other programs rely on (wire specification, A.7.8 and A.7.9).
//! A home never has two daemons, and no step of the stop waits without a bound.
//!
//! - `claim` ensures that a home has one daemon.
//! - `launcher` is the process that keeps the capabilities of a root daemon.
//! - `stop` is the switch that stops the daemon.

mod claim;
pub mod discovery;
pub mod http;
pub mod jobs;
pub mod launcher;
pub mod rpc;
pub mod stop;
pub mod supervisor;
pub mod tailscale;

use std::fmt::Display;
use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;
use landfall_engine::process::raise_descriptor_limit;
use thiserror::Error;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{Notify, mpsc};
use tokio::task::JoinSet;
use tokio::time::timeout;

use crate::broker::brokers::{Brokers, Finding, Report};
use crate::broker::message::Extensions;
use crate::daemon::discovery::Discovery;
use crate::daemon::http::container_socket::ContainerSockets;
use crate::daemon::http::gateway::{self, SharedFacts};
use crate::daemon::http::{Http, HttpError};
use crate::daemon::jobs::Jobs;
use crate::daemon::rpc::request_handler::RequestHandler;
use crate::daemon::rpc::server::{self, Server};
use crate::daemon::supervisor::Supervisor;
use crate::daemon::tailscale::{Tailscale, TailscaleOptions};
use crate::docker::helper_container::{Helper, HelperOptions};
use crate::docker::liveness::RegistrationProbe;
use crate::docker::{Docker, LifeEvent};
use crate::forwarding::driver::{Forwarding, ForwardingOptions};
use crate::model::event::Event;
use crate::model::native_sockets::Sockets;
use crate::model::port_policy::ControlPorts;
use crate::registry::folder::Approvals;
use crate::registry::grants::GrantTable;
use crate::registry::store::{DropReason, RegistrationObserver, Registry, RegistryOptions};
use crate::sys::journal::Journal;
use crate::sys::launcher::{LauncherError, launcher};
use crate::sys::paths::{self, Home, HomeError};
use crate::sys::private_file;
use crate::version;
use claim::Claim;
pub use claim::ClaimError;
use stop::StopSwitch;

/// How long a start waits for Docker to report its bridge gateway. A later answer is applied when it arrives.
const GATEWAY_WAIT_MAX: Duration = Duration::from_millis(500);
/// The time limit for the registry and tailscale to drain after a stop request over the socket. The client waits 5 s for
/// the socket file to disappear (wire specification, A.8).
const REQUESTED_DRAIN_TIME_MAX: Duration = Duration::from_secs(3);

/// The options of a daemon.
#[derive(Clone, Debug)]
pub struct Options {
    /// The home directory.
    pub home: Home,
    /// The preferred HTTP port.
    pub http_port: u16,
    /// Addresses for HTTP in addition to 127.0.0.1. If empty, the addresses at which Docker's containers reach the host.
    pub http_bind: Vec<IpAddr>,
    /// Whether the daemon restarts containers.
    pub restart: bool,
    /// Whether all containers that Docker lists are forwarded.
    pub discover_all: bool,
    /// Whether forwarded ports are offered on the tailnet.
    pub tailscale: bool,
    /// Whether containers are entered through a helper container.
    pub docker_helper: bool,
    /// The default of `landfall run` for how servers listen.
    pub sockets: Sockets,
    /// The largest build context that is sent to Docker, in bytes.
    pub build_context_bytes_max: u64,
    /// How long one call of the `tailscale` program may take.
    pub tailscale_timeout: Duration,
    /// How often the daemon checks that containers still exist.
    pub gc_interval: Duration,
    /// The number of consecutive checks that must miss a container before its registration is removed.
    pub gc_misses: u32,
    /// How long each step of a stop may take.
    pub cleanup_timeout: Duration,
    /// The protocol extensions that the port brokers offer to containers.
    pub broker_extensions: Extensions,
}

/// The reasons why a daemon does not start.
#[derive(Debug, Error)]
pub enum StartError {
    /// Its directories cannot be created.
    #[error(transparent)]
    Home(#[from] HomeError),
    /// The home already has a daemon.
    #[error(transparent)]
    Claim(#[from] ClaimError),
    /// The HTTP endpoint cannot be opened.
    #[error(transparent)]
    Http(#[from] HttpError),
    /// One of the daemon's files cannot be opened.
    #[error("{} cannot be opened", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// The error of the system call.
        source: io::Error,
    },
    /// Signal handlers cannot be installed.
    #[error("signal handlers cannot be installed")]
    Signals(#[source] io::Error),
}

/// Starts a daemon and returns after an orderly stop.
///
/// # Errors
/// [`StartError`]. All that was started before the error has been released.
pub async fn run(options: Options) -> Result<(), StartError> {
    let daemon = start(options).await?;
    daemon.request_handler.stop.started().await;
    daemon.stop().await;
    Ok(())
}

/// A daemon that serves requests.
struct Daemon {
    options: Options,
    request_handler: Arc<RequestHandler>,
    http: Http,
    /// Tasks that are aborted at the stop: they follow Docker, forwarding and signals, and have nothing to finish.
    tasks: JoinSet<()>,
    tailscale: Tailscale,
    server: Server,
    /// Device and inode of the socket file when it was created.
    socket: Option<(u64, u64)>,
    claim: Claim,
}

/// Starts the daemon: takes the claim, replays registrations, opens HTTP, and opens the socket last, since a client that
/// is answered there may request the HTTP port at once.
async fn start(options: Options) -> Result<Daemon, StartError> {
    let home = options.home.clone();
    home.ensure_directories()?;
    let claim = Claim::take(&home).await?;
    let stop = StopSwitch::default();
    let mut tasks = JoinSet::new();
    tasks.spawn(stop_on_signals(stop.clone())?);
    let journal = open_journal(&home)?;
    // Clients may hold hundreds of descriptors.
    raise_descriptor_limit();

    let docker = Docker::from_environment().with_context_bytes_max(options.build_context_bytes_max);
    let approvals = Approvals::of(&home);
    if let Err(error) = approvals.file().read() {
        let text = format!("no file of any folder is trusted: {error}; landfall trust DIR starts a new list");
        journal.record(&Event::Notice { text });
    }
    let grants = GrantTable::default();
    let supervisor = Supervisor::new(docker.clone(), grants.clone(), journal.clone(), approvals.clone());
    if !options.restart {
        // Jobs request restarts, too.
        supervisor.disable();
    }
    let (brokers, reports) = Brokers::new(docker.clone(), journal.clone(), options.broker_extensions);
    let sockets = ContainerSockets::new(home.clone(), docker.clone(), journal.clone());
    let observers: Vec<Arc<dyn RegistrationObserver>> = vec![
        brokers.clone(),
        sockets.clone(),
        Jobs::new(journal.clone(), supervisor.clone(), approvals.clone()),
    ];
    let registry =
        Registry::open(registry_options(&options, grants, &journal, &docker, &approvals, observers));
    let addresses = addresses(&options, &docker).await;
    let last = read_number(&home.http_port_file());
    let bound = http::Bound::listen(options.http_port, last, &addresses, &journal).await?;
    write_number(&home.http_port_file(), bound.port());
    let helper = Helper::start(HelperOptions {
        on: options.docker_helper,
        home: home.clone(),
        docker: docker.clone(),
        journal: journal.clone(),
    });
    let forwarding = Forwarding::start(ForwardingOptions {
        home: home.clone(),
        journal: journal.clone(),
        docker: docker.clone(),
        helper: helper.socket(),
        replayed: replayed(registry.clone()),
        registrations: registry.watch(),
        control_ports: ControlPorts::new([bound.port()]),
    });
    let links = forwarding.clone();
    brokers.connect(Box::new(move |name| links.broker(name)));
    let tailscale = Tailscale::start(TailscaleOptions {
        on: options.tailscale,
        file: home.tailscale_file(),
        timeout: options.tailscale_timeout,
        journal: journal.clone(),
        answering: forwarding.open_ports(),
    });
    let discovery = Discovery::new(docker.clone(), registry.clone(), journal.clone(), options.discover_all);
    let request_handler = Arc::new(RequestHandler {
        home: home.clone(),
        version: version::current(),
        http_port: bound.port(),
        http_facts: SharedFacts::default(),
        tailscale: options.tailscale,
        sockets: options.sockets,
        helper: helper.clone(),
        registry: registry.clone(),
        approvals,
        forwarding: forwarding.clone(),
        discovery: discovery.clone(),
        supervisor: options.restart.then_some(supervisor),
        journal: journal.clone(),
        stop,
    });
    let http = bound.serve(Arc::clone(&request_handler));
    sockets.connect(http.clone());
    tasks.spawn(sweep(sockets, registry.clone()));
    tasks.spawn(gateway::reclaim(http.clone()));
    let gateway_changed = Arc::new(Notify::new());
    if options.http_bind.is_empty() {
        tasks.spawn(gateway::keep_listening(http.clone(), docker.clone(), Arc::clone(&gateway_changed)));
    }
    tasks.spawn(discovery.clone().run());
    let observers =
        Observers { registry: registry.clone(), forwarding: forwarding.clone(), helper, discovery };
    tasks.spawn(watch_launcher(journal.clone()));
    tasks.spawn(follow_docker(docker, observers, gateway_changed));
    tasks.spawn(follow_ends(registry.clone(), forwarding));
    tasks.spawn(follow_reports(registry, reports));

    let path = home.socket();
    let listener = server::listen(&path).map_err(|source| StartError::File { path: path.clone(), source })?;
    let socket = paths::identity_of_name(&path);
    let server = Server::start(listener, Arc::clone(&request_handler));
    write_number(&home.pid_file(), std::process::id());
    journal.record(&Event::DaemonListening { socket: path.display().to_string() });
    Ok(Daemon { options, request_handler, http, tasks, tailscale, server, socket, claim })
}

impl Daemon {
    /// Stops the daemon. The HTTP port is released first, since the next daemon needs it. The socket file is removed last,
    /// since the next daemon waits for its removal. Until then the socket answers that the daemon is stopping. Each step is
    /// bounded in time.
    async fn stop(mut self) {
        let RequestHandler { journal, registry, forwarding, supervisor, helper, stop, .. } =
            &*self.request_handler;
        let bound = self.options.cleanup_timeout;
        journal.record(&Event::DaemonStopping);
        run_bounded(bound, "HTTP", journal, self.http.close()).await;
        let drain = if stop.was_requested() { bound.min(REQUESTED_DRAIN_TIME_MAX) } else { bound };
        tokio::join!(
            run_bounded(drain, "jobs and brokers", journal, registry.stop()),
            run_bounded(drain, "tailscale", journal, self.tailscale.stop()),
        );
        if let Some(supervisor) = supervisor {
            run_bounded(bound, "restarts", journal, supervisor.stop()).await;
        }
        if stop.drains_engine() {
            run_bounded(bound, "the engine", journal, forwarding.stop_engine()).await;
        } else {
            run_bounded(bound, "forwarding", journal, forwarding.detach()).await;
        }
        // The openers that the helper started serve the engine as long as the engine runs.
        run_bounded(bound, "the helper", journal, helper.stop(stop.drains_engine())).await;
        remove_pid_file(&self.options.home.pid_file());
        self.server.close().await;
        self.tasks.shutdown().await;
        self.claim.release(self.socket);
    }
}

/// Runs one step of the stop, and abandons it after `bound`.
async fn run_bounded(bound: Duration, what: &str, journal: &Journal, step: impl Future<Output = ()>) {
    if timeout(bound, step).await.is_err() {
        let text = format!("{what} did not stop within {} ms and was abandoned", bound.as_millis());
        journal.record(&Event::Notice { text });
    }
}

fn registry_options(
    options: &Options,
    grants: GrantTable,
    journal: &Journal,
    docker: &Docker,
    approvals: &Approvals,
    observers: Vec<Arc<dyn RegistrationObserver>>,
) -> RegistryOptions {
    RegistryOptions {
        home: options.home.clone(),
        approvals: approvals.clone(),
        grants,
        journal: journal.clone(),
        liveness: Arc::new(RegistrationProbe { docker: docker.clone() }),
        observers,
        cleanup_timeout: options.cleanup_timeout,
        gc_interval: options.gc_interval,
        gc_misses: options.gc_misses,
    }
}

/// Returns the addresses on which HTTP listens from the start. Leaves out a Docker gateway that is not an address of this
/// host: the Docker engine is remote, or its bridge is down.
async fn addresses(options: &Options, docker: &Docker) -> Vec<IpAddr> {
    let mut addresses = vec![IpAddr::V4(Ipv4Addr::LOCALHOST)];
    addresses.extend(&options.http_bind);
    if options.http_bind.is_empty()
        && let Ok(Some(gateway)) = timeout(GATEWAY_WAIT_MAX, docker.bridge_gateway()).await
        && TcpListener::bind((gateway, 0)).await.is_ok()
    {
        addresses.push(gateway);
    }
    addresses
}

/// Returns a future that is ready when the registrations of the previous daemon are restored.
fn replayed(registry: Registry) -> BoxFuture<'static, ()> {
    Box::pin(async move { registry.replayed().await })
}

/// The modules that reread a container after a Docker event.
struct Observers {
    registry: Registry,
    forwarding: Forwarding,
    helper: Helper,
    discovery: Discovery,
}

impl Observers {
    /// Handles an event of one Docker container, or a resync of all.
    fn hint(&self, event: &LifeEvent) {
        match event {
            LifeEvent::Resync => {
                self.forwarding.set_events_followed(true);
                self.helper.recheck(None);
            }
            LifeEvent::Changed { name, .. } => self.helper.recheck(Some(name)),
            LifeEvent::Lost => return self.forwarding.set_events_followed(false),
        }
        self.discovery.refresh();
        for entry in &self.registry.list().entries {
            let is_affected = match event {
                LifeEvent::Resync => true,
                LifeEvent::Lost => false,
                LifeEvent::Changed { id, name, .. } => {
                    let known = entry.discovered.as_ref().and_then(|found| found.id.as_ref());
                    entry.docker_name().as_str() == name || known == Some(id)
                }
            };
            if is_affected {
                self.registry.recheck(entry.container_name.as_str());
                self.forwarding.recheck(entry.container_name.as_str());
            }
        }
    }
}

/// Distributes Docker's events, and reports when the address of its bridge may have changed.
async fn follow_docker(docker: Docker, observers: Observers, gateway_changed: Arc<Notify>) {
    let mut events = docker.life_events();
    while let Some(event) = events.recv().await {
        observers.hint(&event);
        if event == LifeEvent::Resync {
            gateway_changed.notify_one();
        }
    }
}

/// Removes the sockets of containers that are gone, after the registrations are restored.
async fn sweep(sockets: Arc<ContainerSockets>, registry: Registry) {
    registry.replayed().await;
    let known: Vec<_> = registry.list().entries.iter().map(|entry| entry.container_name.clone()).collect();
    sockets.sweep(&known).await;
}

/// Reports the end of the launcher, if this daemon has one.
async fn watch_launcher(journal: Journal) {
    let Some(launcher) = launcher() else { return };
    launcher.ended().await;
    let text = format!("{}; until then no container can be entered", LauncherError::Gone);
    journal.record(&Event::Notice { text });
}

/// Removes a registration that stands for a process when that process ends.
async fn follow_ends(registry: Registry, forwarding: Forwarding) {
    let mut ended = forwarding.ended();
    while let Some(name) = ended.recv().await {
        registry.deregister(name.as_str(), DropReason::Gone).await;
    }
}

/// Applies the findings of brokers to the registrations, unless the container has since been registered with another token.
async fn follow_reports(registry: Registry, mut reports: mpsc::UnboundedReceiver<Report>) {
    while let Some(Report { name, token, finding }) = reports.recv().await {
        let registry = registry.clone();
        // The queue of one container may be busy; the others do not wait for it.
        tokio::spawn(async move {
            match finding {
                Finding::Answered => registry.require_challenge(&name, &token).await,
                Finding::Rejected(reason) => registry.fatal_auth(&name, &token, &reason).await,
            }
        });
    }
}

/// Stops the daemon in order on SIGTERM or SIGINT. A second signal has no further effect.
fn stop_on_signals(stop: StopSwitch) -> Result<impl Future<Output = ()>, StartError> {
    let mut terminate = signal(SignalKind::terminate()).map_err(StartError::Signals)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(StartError::Signals)?;
    Ok(async move {
        loop {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            stop.start(false);
        }
    })
}

/// Opens the journal, and logs panics in it: a panic ends only its own task.
fn open_journal(home: &Home) -> Result<Journal, StartError> {
    let path = home.daemon_log();
    let journal = Journal::open(&path).map_err(|source| StartError::File { path, source })?;
    let panics = journal.clone();
    let default = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        default(panic);
        panics.record(&Event::Notice { text: panic.to_string() });
    }));
    Ok(journal)
}

/// Writes a number to a file for users or for the next daemon. The file is a hint, so a failed write does not prevent the
/// start.
fn write_number(path: &Path, number: impl Display) {
    let mut aside = path.as_os_str().to_owned();
    aside.push(".new");
    if private_file::write_path(aside.as_ref(), &format!("{number}\n")).is_ok() {
        let _ = std::fs::rename(&aside, path);
    }
}

/// The maximum size of a file that holds a number, in bytes.
const NUMBER_BYTES_MAX: u64 = 32;

/// Reads a number that [`write_number`] wrote.
fn read_number<T: FromStr>(path: &Path) -> Option<T> {
    let text = private_file::read_path(path, NUMBER_BYTES_MAX).ok()?;
    std::str::from_utf8(&text).ok()?.trim().parse().ok()
}

/// Removes the file of the process id, unless it holds the id of another process.
fn remove_pid_file(path: &Path) {
    if read_number(path) == Some(std::process::id()) {
        let _ = std::fs::remove_file(path);
    }
}
