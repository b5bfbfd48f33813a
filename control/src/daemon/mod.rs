//! The daemon: `landfall _hostd`.
//!
//! It knows the containers, answers the command line and the containers, and drives the engine, which is a process of its
//! own and outlives it. Starting and stopping are one screen each (`start`, `Daemon::stop`); their order is what
//! other programs rely on (wire specification, A.7.8 and A.7.9).
//!
//! - `claim` makes it the only one of its home.
//! - `launcher` is the process that keeps the capabilities of a root daemon.
//! - `stop` is the switch that ends it.

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

/// How long a start waits to hear how containers reach the host. A Docker that answers later is heard later.
const GATEWAY_PATIENCE: Duration = Duration::from_millis(500);
/// How long the attendants have to drain when the stop was asked for over the socket: whoever asked waits 5 s for the
/// socket's file to disappear (wire specification, A.8).
const ASKED_DRAIN_TIME_MAX: Duration = Duration::from_secs(3);

/// What a daemon is started with.
#[derive(Clone, Debug)]
pub struct Options {
    /// Its home.
    pub home: Home,
    /// The HTTP port that it prefers.
    pub http_port: u16,
    /// Where HTTP listens beside 127.0.0.1; empty for where Docker's containers reach the host.
    pub http_bind: Vec<IpAddr>,
    /// Whether it restarts containers.
    pub restart: bool,
    /// Whether every container of Docker's is forwarded.
    pub discover_all: bool,
    /// Whether what answers on the host is offered on the tailnet.
    pub tailscale: bool,
    /// Whether containers are entered by a helper container.
    pub docker_helper: bool,
    /// How servers under `run` listen by default.
    pub sockets: Sockets,
    /// The most bytes of a folder that are sent to a build.
    pub build_context_bytes_max: u64,
    /// How long a call of tailscale may take.
    pub tailscale_timeout: Duration,
    /// How often it looks whether containers still exist.
    pub gc_interval: Duration,
    /// How many looks in a row have to miss a container.
    pub gc_misses: u32,
    /// How long one step of a teardown may take.
    pub cleanup_timeout: Duration,
    /// What the port brokers offer to containers.
    pub broker_extensions: Extensions,
}

/// Why a daemon did not start.
#[derive(Debug, Error)]
pub enum StartError {
    /// Its directories cannot be made.
    #[error(transparent)]
    Home(#[from] HomeError),
    /// It is not the only one of its home.
    #[error(transparent)]
    Claim(#[from] ClaimError),
    /// Its HTTP endpoint cannot be had.
    #[error(transparent)]
    Http(#[from] HttpError),
    /// A file of its own cannot be had.
    #[error("{} cannot be opened", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Signals cannot be waited for.
    #[error("signals cannot be waited for")]
    Signals(#[source] io::Error),
}

/// Starts a daemon and returns when it has stopped in order.
///
/// # Errors
/// [`StartError`]; then nothing of it is left.
pub async fn run(options: Options) -> Result<(), StartError> {
    let daemon = start(options).await?;
    daemon.request_handler.stop.pulled().await;
    daemon.stop().await;
    Ok(())
}

/// A daemon that answers.
struct Daemon {
    options: Options,
    request_handler: Arc<RequestHandler>,
    http: Http,
    /// What ends with the daemon and has nothing to finish: who listens to Docker, to forwarding and to signals.
    tasks: JoinSet<()>,
    tailscale: Tailscale,
    server: Server,
    /// What the socket's file was when it was made.
    socket: Option<(u64, u64)>,
    claim: Claim,
}

/// Starts: one of its kind first, then what it remembers, then HTTP, and the socket last, since whoever is answered there
/// may ask for the HTTP port at once.
async fn start(options: Options) -> Result<Daemon, StartError> {
    let home = options.home.clone();
    home.ensure_directories()?;
    let claim = Claim::take(&home).await?;
    let stop = StopSwitch::default();
    let mut tasks = JoinSet::new();
    tasks.spawn(obey_signals(stop.clone())?);
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
        // Jobs may ask, too.
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
    leave_number(&home.http_port_file(), bound.port());
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
        tasks.spawn(gateway::keep(http.clone(), docker.clone(), Arc::clone(&gateway_changed)));
    }
    tasks.spawn(discovery.clone().run());
    let hinted = HintSource { registry: registry.clone(), forwarding: forwarding.clone(), helper, discovery };
    tasks.spawn(watch_launcher(journal.clone()));
    tasks.spawn(follow_docker(docker, hinted, gateway_changed));
    tasks.spawn(follow_ends(registry.clone(), forwarding));
    tasks.spawn(follow_reports(registry, reports));

    let path = home.socket();
    let listener = server::listen(&path).map_err(|source| StartError::File { path: path.clone(), source })?;
    let socket = paths::identity_of_name(&path);
    let server = Server::start(listener, Arc::clone(&request_handler));
    leave_number(&home.pid_file(), std::process::id());
    journal.record(&Event::DaemonListening { socket: path.display().to_string() });
    Ok(Daemon { options, request_handler, http, tasks, tailscale, server, socket, claim })
}

impl Daemon {
    /// Stops: the HTTP port is free first, since the next daemon needs it; the socket's file goes last, since its going is
    /// what the next one waits for. The socket answers meanwhile: that it stops. Every step is bounded in time.
    async fn stop(mut self) {
        let RequestHandler { journal, registry, forwarding, supervisor, helper, stop, .. } =
            &*self.request_handler;
        let bound = self.options.cleanup_timeout;
        journal.record(&Event::DaemonStopping);
        within(bound, "HTTP", journal, self.http.close()).await;
        let drain = if stop.was_asked() { bound.min(ASKED_DRAIN_TIME_MAX) } else { bound };
        tokio::join!(
            within(drain, "what runs beside containers", journal, registry.stop()),
            within(drain, "tailscale", journal, self.tailscale.stop()),
        );
        if let Some(supervisor) = supervisor {
            within(bound, "a restart", journal, supervisor.stop()).await;
        }
        if stop.drains_engine() {
            within(bound, "the engine", journal, forwarding.stop_engine()).await;
        } else {
            within(bound, "forwarding", journal, forwarding.detach()).await;
        }
        // The openers that it started serve the engine for as long as that lives.
        within(bound, "the helper", journal, helper.stop(stop.drains_engine())).await;
        take_pid(&self.options.home.pid_file());
        self.server.close().await;
        self.tasks.shutdown().await;
        self.claim.release(self.socket);
    }
}

/// Gives one step of the stop its time, and no more than that.
async fn within(bound: Duration, what: &str, journal: &Journal, step: impl Future<Output = ()>) {
    if timeout(bound, step).await.is_err() {
        let text = format!("{what} took longer than {} ms to stop and was left", bound.as_millis());
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

/// Where HTTP listens from the start. An address of Docker's that is none of the machine's (its engine is elsewhere, or
/// its bridge is down) is left out.
async fn addresses(options: &Options, docker: &Docker) -> Vec<IpAddr> {
    let mut addresses = vec![IpAddr::V4(Ipv4Addr::LOCALHOST)];
    addresses.extend(&options.http_bind);
    if options.http_bind.is_empty()
        && let Ok(Some(gateway)) = timeout(GATEWAY_PATIENCE, docker.bridge_gateway()).await
        && TcpListener::bind((gateway, 0)).await.is_ok()
    {
        addresses.push(gateway);
    }
    addresses
}

/// Ready when the registrations of the last daemon are back.
fn replayed(registry: Registry) -> BoxFuture<'static, ()> {
    Box::pin(async move { registry.replayed().await })
}

/// Who looks at containers.
struct HintSource {
    registry: Registry,
    forwarding: Forwarding,
    helper: Helper,
    discovery: Discovery,
}

impl HintSource {
    /// Something has happened to a container of Docker's, or to any.
    fn hint(&self, event: &LifeEvent) {
        match event {
            LifeEvent::Resync => {
                self.forwarding.set_events_followed(true);
                self.helper.look_again(None);
            }
            LifeEvent::Changed { name, .. } => self.helper.look_again(Some(name)),
            LifeEvent::Lost => return self.forwarding.set_events_followed(false),
        }
        self.discovery.look_again();
        for entry in &self.registry.list().entries {
            let is_meant = match event {
                LifeEvent::Resync => true,
                LifeEvent::Lost => false,
                LifeEvent::Changed { id, name, .. } => {
                    let known = entry.discovered.as_ref().and_then(|found| found.id.as_ref());
                    entry.docker_name().as_str() == name || known == Some(id)
                }
            };
            if is_meant {
                self.registry.look_again(entry.container_name.as_str());
                self.forwarding.recheck(entry.container_name.as_str());
            }
        }
    }
}

/// Passes hints from Docker on, and says when its bridge may have another address.
async fn follow_docker(docker: Docker, hinted: HintSource, gateway_changed: Arc<Notify>) {
    let mut events = docker.life_events();
    while let Some(event) = events.recv().await {
        hinted.hint(&event);
        if event == LifeEvent::Resync {
            gateway_changed.notify_one();
        }
    }
}

/// Removes what belongs to containers that are gone, once it is known which are registered.
async fn sweep(sockets: Arc<ContainerSockets>, registry: Registry) {
    registry.replayed().await;
    let known: Vec<_> = registry.list().entries.iter().map(|entry| entry.container_name.clone()).collect();
    sockets.sweep(&known).await;
}

/// Reports the end of the launcher, where this daemon has one.
async fn watch_launcher(journal: Journal) {
    let Some(launcher) = launcher() else { return };
    launcher.ended().await;
    let text = format!("{}; until then no container can be entered", LauncherError::Gone);
    journal.record(&Event::Notice { text });
}

/// A registration that stood for a process ends with it.
async fn follow_ends(registry: Registry, forwarding: Forwarding) {
    let mut ended = forwarding.ended();
    while let Some(name) = ended.recv().await {
        registry.deregister(name.as_str(), DropReason::Gone).await;
    }
}

/// Applies what brokers find out to the registrations, unless a container was registered with another token since.
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

/// SIGTERM and SIGINT stop in order; the second one finds that already done.
fn obey_signals(stop: StopSwitch) -> Result<impl Future<Output = ()>, StartError> {
    let mut terminate = signal(SignalKind::terminate()).map_err(StartError::Signals)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(StartError::Signals)?;
    Ok(async move {
        loop {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            stop.pull(false);
        }
    })
}

/// Opens the journal, and has panics told there: a task that panics ends nothing but itself.
fn open_journal(home: &Home) -> Result<Journal, StartError> {
    let path = home.daemon_log();
    let journal = Journal::open(&path).map_err(|source| StartError::File { path, source })?;
    let told = journal.clone();
    let default = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        default(panic);
        told.record(&Event::Notice { text: panic.to_string() });
    }));
    Ok(journal)
}

/// Leaves a number for people, or for the next daemon. It is a hint, so that it cannot be written is no reason not to
/// start.
fn leave_number(path: &Path, number: impl Display) {
    let mut aside = path.as_os_str().to_owned();
    aside.push(".new");
    if private_file::write_path(aside.as_ref(), &format!("{number}\n")).is_ok() {
        let _ = std::fs::rename(&aside, path);
    }
}

/// The longest file of a number, in bytes.
const NUMBER_BYTES_MAX: u64 = 32;

/// Reads a number that was left.
fn read_number<T: FromStr>(path: &Path) -> Option<T> {
    let text = private_file::read_path(path, NUMBER_BYTES_MAX).ok()?;
    std::str::from_utf8(&text).ok()?.trim().parse().ok()
}

/// Takes the process id away again, unless somebody else has left theirs.
fn take_pid(path: &Path) {
    if read_number(path) == Some(std::process::id()) {
        let _ = std::fs::remove_file(path);
    }
}
