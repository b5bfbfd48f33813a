//! The I/O shell around a broker's session on the host's side: one task, which waits for the next event, passes it to
//! the session, and performs the actions that the session returns.
//!
//! It always waits for all event sources together. A connection attempt is a future among them, a task writes to the
//! WebSocket, each stream has a pump task, and tasks of [`Dials`] serve the engine's channels.

use std::collections::{HashMap, VecDeque};
use std::net::Ipv4Addr;
use std::num::NonZeroU16;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;
use landfall_engine::opener::DialFailure;
use tokio::sync::{mpsc, oneshot};
use tokio::task::{AbortHandle, Id, JoinSet};
use tokio::time::{Instant, sleep_until, timeout};
use tokio_util::sync::CancellationToken;

use super::brokers::{Finding, Report};
use super::connection::{self, ConnectError, Connection, ConnectionEvent, Opened};
use super::dials::{DialRequest, Dials};
use super::host::{Action, DialKey, Input, Session};
use super::message::{Extensions, Frame, Side, StreamId, relay_text};
use super::pair::Pairs;
use super::pump::{self, Inlet, Outlet};
use crate::docker::{Docker, DockerError};
use crate::error::chain;
use crate::forwarding::broker_link::{Announcement, BrokerLink, SessionUpdate};
use crate::model::event::Event;
use crate::model::port_policy::CONTAINER_PORT;
use crate::model::registration::{ContainerName, Token};
use crate::sys::journal::Journal;

/// The time limit for Docker to report the published port; the time limit for a port that is not published yet; and the
/// interval between requests meanwhile (wire specification, A.6.1).
const LOOK_UP_MAX: Duration = Duration::from_secs(2);
const UNPUBLISHED_MAX: Duration = Duration::from_millis(500);
const LOOK_UP_INTERVAL: Duration = Duration::from_millis(50);
/// The time limit for forwarding to report the stop of the broker to the engine. It exceeds the time limit of the
/// engine.
const STOP_REPORT_MAX: Duration = Duration::from_secs(15);
/// The largest capacity of the action buffer that is kept.
const ACTIONS_KEPT: usize = 1_024;
/// The sleep time if no deadline is set.
const IDLE: Duration = Duration::from_secs(3_600);

/// The configuration of a broker.
#[derive(Clone, Debug)]
pub(super) struct Broker {
    pub(super) name: ContainerName,
    pub(super) token: Token,
    /// Whether the container has to answer a challenge, and never gets the token.
    pub(super) must_answer: bool,
    /// The host port of the registration; `None` if only Docker has it.
    pub(super) registered_port: Option<NonZeroU16>,
    /// The container's name in Docker, if Docker is to be asked.
    pub(super) docker_name: Option<ContainerName>,
    pub(super) docker: Docker,
    pub(super) journal: Journal,
    pub(super) offered: Extensions,
    pub(super) reports: mpsc::UnboundedSender<Report>,
}

impl Broker {
    /// Sends a finding about the container.
    pub(super) fn report(&self, finding: Finding) {
        // The receiver is closed in a daemon that has stopped.
        let _ = self.reports.send(Report { name: self.name.clone(), token: self.token.clone(), finding });
    }
}

/// A running broker.
pub(super) struct Driver {
    broker: Broker,
    link: BrokerLink,
    /// Whether forwarding has ended.
    is_unlinked: bool,
    session: Session,
    actions: Vec<Action>,
    /// Announcements for which the link has no room. Messages of the container are not read while there are any.
    announcements: VecDeque<Announcement>,
    attempt: Option<BoxFuture<'static, Result<Opened, ConnectError>>>,
    connection: Option<Connection>,
    dials: Dials,
    pairs: Arc<Pairs>,
    streams: HashMap<StreamId, Stream>,
    pumps: JoinSet<()>,
    pumped: HashMap<Id, StreamId>,
}

/// The host's part of a stream: its inlet, and a pump after it is opened.
struct Stream {
    inlet: Inlet,
    /// Taken by the pump.
    outlet: Option<Outlet>,
    pump: Option<AbortHandle>,
}

impl Driver {
    pub(super) fn new(broker: Broker, link: BrokerLink) -> Driver {
        let session = Session::new(broker.token.clone(), broker.must_answer, broker.offered, now());
        Driver {
            broker,
            link,
            is_unlinked: false,
            session,
            actions: Vec::new(),
            announcements: VecDeque::new(),
            attempt: None,
            connection: None,
            dials: Dials::new(),
            pairs: Arc::new(Pairs::new()),
            streams: HashMap::new(),
            pumps: JoinSet::new(),
            pumped: HashMap::new(),
        }
    }

    /// Runs until it is asked to stop, or until the container has refused the token permanently. Returns the reason of
    /// the refusal.
    pub(super) async fn run(mut self, stop: &CancellationToken) -> Option<String> {
        let mut input = Input::Time;
        let rejected = loop {
            let rejected = self.handle(input);
            if self.session.is_stopped() {
                break rejected;
            }
            input = self.next(stop).await;
        };
        self.shut_down().await;
        rejected
    }

    /// Passes an event to the session, and performs its actions. Returns the reason if the token was refused.
    fn handle(&mut self, input: Input) -> Option<String> {
        // The buffer is reused, so that a message of a stream does not allocate here.
        let mut actions = std::mem::take(&mut self.actions);
        self.session.on(input, now(), &mut actions);
        let mut rejected = None;
        for action in actions.drain(..) {
            match action {
                Action::Connect => self.attempt = Some(Box::pin(connect(self.broker.clone()))),
                Action::Disconnect => {
                    self.attempt = None;
                    if let Some(connection) = self.connection.take() {
                        connection.close();
                    }
                }
                Action::Send(message) => {
                    if let Some(connection) = &self.connection {
                        connection.outbox.send_control(message.to_text());
                    }
                }
                Action::Announce(announcement) => self.announcements.push_back(announcement),
                Action::StartStream { stream, key } => self.start_stream(stream, key),
                Action::Refuse { key, why } => self.dials.pending_reply(key).refused(why),
                Action::Deliver(stream, frame) => self.deliver(stream, frame),
                Action::ResetStream(stream) => self.reset_stream(stream),
                Action::Notice(text) => self.notice(&text),
                Action::Answered => self.broker.report(Finding::Answered),
                Action::Rejected(reason) => rejected = Some(reason),
            }
        }
        if actions.capacity() <= ACTIONS_KEPT {
            self.actions = actions;
        }
        rejected
    }

    /// Waits for the next event.
    async fn next(&mut self, stop: &CancellationToken) -> Input {
        loop {
            let due = self.session.due().map_or_else(|| Instant::now() + IDLE, Instant::from_std);
            tokio::select! {
                () = stop.cancelled() => return Input::Stop,
                () = sleep_until(due) => return Input::Time,
                attempt = attempted(&mut self.attempt) => {
                    self.attempt = None;
                    return match attempt {
                        Ok((connection, proof)) => {
                            self.connection = Some(connection);
                            Input::Opened(proof)
                        }
                        Err(error) => Input::Lost(chain(&error)),
                    };
                }
                room = self.link.announce.reserve(), if !self.announcements.is_empty() => match (room, self.announcements.pop_front()) {
                    (Ok(room), Some(announcement)) => room.send(announcement),
                    // If forwarding has ended, the daemon ends, too.
                    _ => self.announcements.clear(),
                },
                // Read the container's next message only after all results for earlier messages are sent.
                heard = connection::heard(&mut self.connection), if self.announcements.is_empty() && self.link.updates.is_empty() => match heard {
                    ConnectionEvent::Text(message) => return Input::Text(message),
                    ConnectionEvent::Binary(stream, frame) => return Input::Binary(stream, frame),
                    ConnectionEvent::Unreadable(why) => self.notice(&format!("a message could not be read: {why}")),
                    ConnectionEvent::Lost(why) => {
                        self.connection = None;
                        return Input::Lost(why);
                    }
                },
                word = self.link.updates.recv(), if !self.is_unlinked => match word {
                    Some(SessionUpdate::Result(result)) => return Input::Result(result),
                    Some(SessionUpdate::Serve(channels)) => self.dials.serve(channels),
                    None => self.is_unlinked = true,
                },
                asked = self.dials.next() => return from_engine(asked),
                Some(ended) = self.pumps.join_next_with_id() => {
                    let id = ended.map_or_else(|error| error.id(), |(id, ())| id);
                    if let Some(stream) = self.pumped.remove(&id) {
                        self.streams.remove(&stream);
                        return Input::StreamEnded(stream);
                    }
                }
            }
        }
    }

    fn start_stream(&mut self, stream: StreamId, key: DialKey) {
        let reply = self.dials.pending_reply(key);
        let Some(outbox) = self.connection.as_ref().map(|connection| connection.outbox.clone()) else {
            return;
        };
        let (pairs, used) = (Arc::clone(&self.pairs), self.session.used());
        let Some(entry) = self.entry(stream) else { return };
        let Some(outlet) = entry.outlet.take() else { return };
        let pump = self.pumps.spawn(async move {
            match pairs.pair().await {
                Ok((theirs, ours)) => {
                    reply.dialled(theirs);
                    pump::relay(ours, stream, Side::Downstream, used, &outbox, outlet).await;
                }
                Err(_) => {
                    reply.refused(DialFailure::Exhausted);
                    outbox.send_control(relay_text(stream, &Frame::Close(Side::Downstream)));
                }
            }
        });
        self.pumped.insert(pump.id(), stream);
        if let Some(entry) = self.streams.get_mut(&stream) {
            entry.pump = Some(pump);
        }
    }

    fn deliver(&mut self, stream: StreamId, frame: Frame) {
        if let Some(entry) = self.entry(stream) {
            entry.inlet.deliver(frame);
        }
    }

    /// Returns the entry of a stream, and creates it on first use: data may arrive before the container's
    /// acknowledgement.
    fn entry(&mut self, stream: StreamId) -> Option<&mut Stream> {
        let inlets = self.connection.as_mut()?.inlets(self.session.used().credit);
        Some(self.streams.entry(stream).or_insert_with(|| {
            let (inlet, outlet) = inlets.inlet();
            Stream { inlet, outlet: Some(outlet), pump: None }
        }))
    }

    /// Resets a stream: aborting the pump closes its socket, which sends a reset.
    fn reset_stream(&mut self, stream: StreamId) {
        if let Some(pump) = self.streams.remove(&stream).and_then(|stream| stream.pump) {
            self.pumped.remove(&pump.id());
            pump.abort();
        }
    }

    /// Waits until forwarding has closed the connections of this broker, and only then closes the engine's channels.
    /// Dials are answered with a refusal meanwhile.
    async fn shut_down(mut self) {
        let (told, tells) = oneshot::channel();
        let (announce, mut announcements) =
            (self.link.announce.clone(), std::mem::take(&mut self.announcements));
        announcements.push_back(Announcement::Stop(told));
        let stop_report = async move {
            for announcement in announcements {
                // If forwarding has ended, no answer will arrive.
                announce.send(announcement).await.ok()?;
            }
            tells.await.ok()
        };
        let refuse = async {
            loop {
                let input = from_engine(self.dials.next().await);
                self.handle(input);
            }
        };
        tokio::select! {
            answer = timeout(STOP_REPORT_MAX, stop_report) => if answer.is_err() {
                let text = format!("forwarding took longer than {} s to release the broker", STOP_REPORT_MAX.as_secs());
                notice(&self.broker, &text);
            },
            () = refuse => {}
        }
    }

    fn notice(&self, text: &str) {
        notice(&self.broker, text);
    }
}

fn notice(broker: &Broker, text: &str) {
    let text = format!("[portbroker:{}] {text}", broker.name);
    broker.journal.record(&Event::Notice { text });
}

fn from_engine(asked: DialRequest) -> Input {
    match asked {
        DialRequest::Dial(key, port) => Input::Dial(key, port),
        DialRequest::Closed(channel) => Input::ChannelClosed(channel),
    }
}

/// Returns the time of the runtime's clock.
fn now() -> std::time::Instant {
    Instant::now().into_std()
}

/// Waits for the end of the connection attempt, if one is in progress.
async fn attempted(
    attempt: &mut Option<BoxFuture<'static, Result<Opened, ConnectError>>>,
) -> Result<Opened, ConnectError> {
    match attempt {
        Some(attempt) => attempt.await,
        None => std::future::pending().await,
    }
}

async fn connect(broker: Broker) -> Result<Opened, ConnectError> {
    let port = look_up(&broker).await?;
    Connection::open((Ipv4Addr::LOCALHOST, port.get()).into(), &broker).await
}

/// Looks up the host port on which the container's port is published now, since a restart may have changed it. If
/// Docker has the container, it must run and publish the port: otherwise any user of this machine may hold the port. If
/// Docker does not have the container, or does not answer, the registered port is used.
///
/// # Errors
/// [`ConnectError::NotRunning`], [`ConnectError::NotPublished`] and [`ConnectError::NoPort`].
async fn look_up(broker: &Broker) -> Result<NonZeroU16, ConnectError> {
    let registered = broker.registered_port.ok_or(ConnectError::NoPort);
    let Some(name) = &broker.docker_name else { return registered };
    let looked = async {
        let until = Instant::now() + UNPUBLISHED_MAX;
        loop {
            match broker.docker.published_port(name, CONTAINER_PORT).await {
                Ok(None) if Instant::now() < until => tokio::time::sleep(LOOK_UP_INTERVAL).await,
                answer => return answer,
            }
        }
    };
    match timeout(LOOK_UP_MAX, looked).await {
        Ok(Ok(Some(port))) => Ok(port),
        Ok(Ok(None)) => Err(ConnectError::NotPublished(name.clone())),
        Ok(Err(error @ (DockerError::NotRunning(_) | DockerError::Changing(_)))) => {
            Err(ConnectError::NotRunning(error))
        }
        Ok(Err(_)) | Err(_) => registered,
    }
}
