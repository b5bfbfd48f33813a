//! The shell around a broker's session on the host's side: one task, which waits for whatever comes first, has the session
//! decide, and does what it says.
//!
//! It never waits for one thing alone. Connecting is a future beside the others; the WebSocket is written by a task of its
//! own; a stream's pump is another; and what the engine dials comes over channels that are served elsewhere.

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
use super::connection::{self, ConnectError, Connection, Heard, Opened};
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

/// How long Docker may take to say where that is published, and how long it is asked again while it is not (wire
/// specification, A.6.1).
const LOOK_UP_MAX: Duration = Duration::from_secs(2);
const UNPUBLISHED_MAX: Duration = Duration::from_millis(500);
const LOOK_UP_EVERY: Duration = Duration::from_millis(50);
/// How long forwarding may take to tell the engine that the broker stops: longer than the engine may take to hear it.
const FAREWELL_MAX: Duration = Duration::from_secs(15);
/// The most actions for which room is kept.
const ACTIONS_KEPT: usize = 1_024;
/// When nothing is due.
const IDLE: Duration = Duration::from_secs(3_600);

/// What a broker is made of.
#[derive(Clone, Debug)]
pub(super) struct Broker {
    pub(super) name: ContainerName,
    pub(super) token: Token,
    /// It has to answer a challenge, and never gets the token.
    pub(super) must_answer: bool,
    /// The host port of the registration; `None` where only Docker knows it.
    pub(super) registered_port: Option<NonZeroU16>,
    /// What Docker calls the container, where Docker is to be asked.
    pub(super) docker_name: Option<ContainerName>,
    pub(super) docker: Docker,
    pub(super) journal: Journal,
    pub(super) offered: Extensions,
    pub(super) reports: mpsc::UnboundedSender<Report>,
}

impl Broker {
    /// Reports what was found out about the container.
    pub(super) fn report(&self, finding: Finding) {
        // The receiver is gone in a daemon that has stopped.
        let _ = self.reports.send(Report { name: self.name.clone(), token: self.token.clone(), finding });
    }
}

/// A broker that runs.
pub(super) struct Driver {
    broker: Broker,
    link: BrokerLink,
    /// Forwarding has ended and says no more.
    is_deaf: bool,
    session: Session,
    actions: Vec<Action>,
    /// What forwarding has had no room for. Nothing is read from the container while there is any.
    owed: VecDeque<Announcement>,
    attempt: Option<BoxFuture<'static, Result<Opened, ConnectError>>>,
    connection: Option<Connection>,
    dials: Dials,
    pairs: Arc<Pairs>,
    streams: HashMap<StreamId, Stream>,
    pumps: JoinSet<()>,
    pumped: HashMap<Id, StreamId>,
}

/// A stream that has something of ours: what arrived for it, or a pump.
struct Stream {
    inlet: Inlet,
    /// Until the pump has it.
    outlet: Option<Outlet>,
    pump: Option<AbortHandle>,
}

impl Driver {
    pub(super) fn new(broker: Broker, link: BrokerLink) -> Driver {
        let session = Session::new(broker.token.clone(), broker.must_answer, broker.offered, now());
        Driver {
            broker,
            link,
            is_deaf: false,
            session,
            actions: Vec::new(),
            owed: VecDeque::new(),
            attempt: None,
            connection: None,
            dials: Dials::new(),
            pairs: Arc::new(Pairs::new()),
            streams: HashMap::new(),
            pumps: JoinSet::new(),
            pumped: HashMap::new(),
        }
    }

    /// Runs until it is told to stop, or until the container has refused the token for good: then this is the reason.
    pub(super) async fn run(mut self, stop: &CancellationToken) -> Option<String> {
        let mut input = Input::Time;
        let rejected = loop {
            let rejected = self.decide(input);
            if self.session.is_stopped() {
                break rejected;
            }
            input = self.next(stop).await;
        };
        self.leave().await;
        rejected
    }

    /// Has the session decide, and does what it says.
    fn decide(&mut self, input: Input) -> Option<String> {
        // Kept, so that a message of a stream costs no allocation here.
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
                Action::Say(message) => {
                    if let Some(connection) = &self.connection {
                        connection.outbox.say(message.to_text());
                    }
                }
                Action::Announce(announcement) => self.owed.push_back(announcement),
                Action::Begin { stream, key } => self.begin(stream, key),
                Action::Refuse { key, why } => self.dials.owed(key).refused(why),
                Action::Deliver(stream, frame) => self.deliver(stream, frame),
                Action::Cut(stream) => self.cut(stream),
                Action::Notice(text) => self.tell(&text),
                Action::Answered => self.broker.report(Finding::Answered),
                Action::Rejected(reason) => rejected = Some(reason),
            }
        }
        if actions.capacity() <= ACTIONS_KEPT {
            self.actions = actions;
        }
        rejected
    }

    /// What happens next.
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
                room = self.link.announce.reserve(), if !self.owed.is_empty() => match (room, self.owed.pop_front()) {
                    (Ok(room), Some(announcement)) => room.send(announcement),
                    // Where forwarding has ended, the daemon does so as well.
                    _ => self.owed.clear(),
                },
                // A container that is sent many results for one message sends its next one when they are said.
                heard = connection::heard(&mut self.connection), if self.owed.is_empty() && self.link.updates.is_empty() => match heard {
                    Heard::Text(message) => return Input::Text(message),
                    Heard::Binary(stream, frame) => return Input::Binary(stream, frame),
                    Heard::Unreadable(why) => self.tell(&format!("a message could not be read: {why}")),
                    Heard::Lost(why) => {
                        self.connection = None;
                        return Input::Lost(why);
                    }
                },
                word = self.link.updates.recv(), if !self.is_deaf => match word {
                    Some(SessionUpdate::Result(result)) => return Input::Result(result),
                    Some(SessionUpdate::Serve(channels)) => self.dials.serve(channels),
                    None => self.is_deaf = true,
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

    fn begin(&mut self, stream: StreamId, key: DialKey) {
        let owed = self.dials.owed(key);
        let Some(outbox) = self.connection.as_ref().map(|connection| connection.outbox.clone()) else {
            return;
        };
        let (pairs, used) = (Arc::clone(&self.pairs), self.session.used());
        let Some(place) = self.place(stream) else { return };
        let Some(outlet) = place.outlet.take() else { return };
        let pump = self.pumps.spawn(async move {
            match pairs.pair().await {
                Ok((theirs, ours)) => {
                    owed.dialled(theirs);
                    pump::relay(ours, stream, Side::Downstream, used, &outbox, outlet).await;
                }
                Err(_) => {
                    owed.refused(DialFailure::Exhausted);
                    outbox.say(relay_text(stream, &Frame::Close(Side::Downstream)));
                }
            }
        });
        self.pumped.insert(pump.id(), stream);
        if let Some(place) = self.streams.get_mut(&stream) {
            place.pump = Some(pump);
        }
    }

    fn deliver(&mut self, stream: StreamId, frame: Frame) {
        if let Some(place) = self.place(stream) {
            place.inlet.deliver(frame);
        }
    }

    /// What we have of a stream, made when it is first needed: data may come before the container's ack.
    fn place(&mut self, stream: StreamId) -> Option<&mut Stream> {
        let inlets = self.connection.as_mut()?.inlets(self.session.used().credit);
        Some(self.streams.entry(stream).or_insert_with(|| {
            let (inlet, outlet) = inlets.inlet();
            Stream { inlet, outlet: Some(outlet), pump: None }
        }))
    }

    /// Its socket is closed with its pump, which is a reset.
    fn cut(&mut self, stream: StreamId) {
        if let Some(pump) = self.streams.remove(&stream).and_then(|stream| stream.pump) {
            self.pumped.remove(&pump.id());
            pump.abort();
        }
    }

    /// Has forwarding close what led over this broker, and only then the engine's channels. Whoever dials until then gets an
    /// answer.
    async fn leave(mut self) {
        let (told, tells) = oneshot::channel();
        let (announce, mut owed) = (self.link.announce.clone(), std::mem::take(&mut self.owed));
        owed.push_back(Announcement::Stop(told));
        let farewell = async move {
            for announcement in owed {
                // Where forwarding has ended there is nobody to wait for.
                announce.send(announcement).await.ok()?;
            }
            tells.await.ok()
        };
        let refuse = async {
            loop {
                let input = from_engine(self.dials.next().await);
                self.decide(input);
            }
        };
        tokio::select! {
            answer = timeout(FAREWELL_MAX, farewell) => if answer.is_err() {
                let text = format!("forwarding took longer than {} s to let go", FAREWELL_MAX.as_secs());
                notice(&self.broker, &text);
            },
            () = refuse => {}
        }
    }

    fn tell(&self, text: &str) {
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

/// The clock of the runtime.
fn now() -> std::time::Instant {
    Instant::now().into_std()
}

/// The end of the attempt that is under way, if there is one.
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

/// Looks up the host port on which the container's port is published now: a restart may have changed it. A container that
/// Docker has must run and publish the port, since otherwise any user of this machine may hold it. Where Docker does not have
/// the container, or does not answer, the port is the registered one.
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
                Ok(None) if Instant::now() < until => tokio::time::sleep(LOOK_UP_EVERY).await,
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
