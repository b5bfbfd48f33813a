//! One host's WebSocket: the shell around the session machine ([`crate::broker::container`]). It reads, writes, connects and
//! watches as the machine asks, and decides nothing.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::PoisonError;
use std::time::Duration;

use serde_json::Value;
use tokio::net::TcpStream;
use tokio::sync::watch::Receiver;
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::{Instant, sleep_until, timeout};
use tokio_util::sync::CancellationToken;

use super::dial::dial;
use super::hub::HostId;
use super::log::AgentEvent;
use super::server::{QueuePlace, Settings};
use super::watch::Watch;
use crate::broker::challenge::Answer;
use crate::broker::container::{Ask, Attempt, ContainerEvent, HELLO_TIME_MAX, Heard, Session};
use crate::broker::message::{Extensions, Side, StreamId, ToContainer, Unreadable, from_binary};
use crate::broker::outbox::{Outbox, outbox};
use crate::broker::pump::{self, Ended, Inlet, Inlets};
use crate::broker::wire::{Incoming, Reader, Socket, WireError};
use crate::model::registration::Token;

/// How long a host that is sent away has to close its side. A connection that is closed while input lies unread is reset, and
/// what was said last would be lost with that.
const CLOSE_TIME_MAX: Duration = Duration::from_secs(2);
/// How long streams have to end when their WebSocket is gone. They write nothing any more.
const STREAMS_TIME_MAX: Duration = Duration::from_secs(1);
/// The close code of a server that ends (RFC 6455, 7.4.1).
const GOING_AWAY: u16 = 1001;

/// Serves a host until one of the two closes.
pub(super) async fn serve(
    socket: Socket,
    (token, answer): (Token, Option<Answer>),
    settings: &Settings,
    guest: QueuePlace,
    stopping: CancellationToken,
) {
    let (reader, writer) = socket.split();
    let (outbox, queue) = outbox();
    let mut writing = JoinSet::new();
    writing.spawn(async move {
        // Whatever ends it ends the connection.
        let _ = queue.drain(writer).await;
    });
    let mut connection = Connection {
        session: Session::new(token, answer),
        requests: settings.hub.requests(),
        settings,
        outbox,
        writing,
        address: guest.address,
        guest: Some(guest),
        host: None,
        extensions: Extensions::NONE,
        queues: Inlets::new(false),
        inlets: HashMap::new(),
        watch: None,
        dials: JoinSet::new(),
        aborts: HashMap::new(),
        dialled: None,
        pumps: JoinSet::new(),
        due: Instant::now() + HELLO_TIME_MAX,
        closing: false,
    };
    connection.run(reader, stopping).await;
    connection.end().await;
}

type Dialled = (Attempt, StreamId, Result<TcpStream, String>);

struct Connection<'a> {
    session: Session,
    settings: &'a Settings,
    requests: Receiver<u64>,
    outbox: Outbox,
    writing: JoinSet<()>,
    /// Where the host is.
    address: IpAddr,
    /// A place in the lobby, until the host is let in.
    guest: Option<QueuePlace>,
    host: Option<HostId>,
    extensions: Extensions,
    queues: Inlets,
    inlets: HashMap<StreamId, Inlet>,
    watch: Option<Watch>,
    dials: JoinSet<Dialled>,
    aborts: HashMap<Attempt, AbortHandle>,
    /// The socket that the session is just told of.
    dialled: Option<TcpStream>,
    pumps: JoinSet<(Attempt, StreamId, Ended)>,
    /// When the hello has to be there, or the peer's close when we close.
    due: Instant,
    closing: bool,
}

/// What comes next.
enum Next {
    Incoming(Result<Incoming, WireError>),
    Listens(Vec<landfall_engine::watch::parse::WireListener>),
    Dialled(Dialled),
    Over((Attempt, StreamId, Ended)),
    Nothing,
    Requested,
    Due,
    Stop,
    /// Nothing can be written any more, or somebody else needs the place.
    Gone,
}

impl Connection<'_> {
    async fn run(&mut self, mut reader: Reader, stopping: CancellationToken) {
        loop {
            let asks = match self.next(&mut reader, &stopping).await {
                Next::Incoming(Ok(Incoming::Closed { .. })) => {
                    // The answer to it is written while the next one is waited for.
                    let _ = timeout(CLOSE_TIME_MAX, reader.next()).await;
                    return;
                }
                Next::Incoming(Err(_)) | Next::Gone => return,
                Next::Due if self.closing => return,
                Next::Nothing => continue,
                Next::Incoming(Ok(_)) if self.closing => continue,
                Next::Incoming(Ok(incoming)) => {
                    let heard = self.read(incoming);
                    self.settings.hub.with_reserved(|reserved| self.session.heard(heard, reserved))
                }
                Next::Listens(reading) => self.session.reading(reading),
                Next::Dialled((attempt, stream, outcome)) => {
                    self.aborts.remove(&attempt);
                    let outcome = outcome.map(|socket| self.dialled = Some(socket));
                    self.session.connected(attempt, stream, outcome)
                }
                Next::Over((attempt, stream, ended)) => {
                    let overflown = "the server reads too slowly, and too much was queued for it";
                    let error = (ended == Ended::Overflown).then(|| overflown.to_owned());
                    self.session.over(attempt, stream, error)
                }
                Next::Requested => {
                    self.settings.hub.with_reserved(|reserved| self.session.requested(reserved))
                }
                Next::Due => self.session.hello_is_due(),
                Next::Stop => vec![Ask::Close { code: GOING_AWAY, reason: "the agent ends" }],
            };
            asks.into_iter().for_each(|ask| self.obey(ask));
            // One that nobody wants is closed.
            self.dialled = None;
        }
    }

    async fn next(&mut self, reader: &mut Reader, stopping: &CancellationToken) -> Next {
        let Connection { guest, watch, dials, pumps, requests, writing, .. } = self;
        let waits_for_time = self.closing || guest.is_some();
        let reading = async {
            match watch {
                Some(watch) => watch.next().await,
                None => std::future::pending().await,
            }
        };
        let evicted = async {
            match guest {
                Some(guest) => guest.leave.cancelled().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            incoming = reader.next() => Next::Incoming(incoming),
            reading = reading => Next::Listens(reading),
            // One that was given up has no outcome, nor has one that panicked.
            Some(dialled) = dials.join_next() => dialled.map_or(Next::Nothing, Next::Dialled),
            Some(over) = pumps.join_next() => over.map_or(Next::Nothing, Next::Over),
            Ok(()) = requests.changed() => Next::Requested,
            () = sleep_until(self.due), if waits_for_time => Next::Due,
            () = stopping.cancelled(), if !self.closing => Next::Stop,
            () = evicted => Next::Gone,
            _ = writing.join_next(), if !self.closing => Next::Gone,
        }
    }

    fn obey(&mut self, ask: Ask) {
        let hub = &self.settings.hub;
        match ask {
            Ask::Say(message) => self.outbox.say(message.to_text()),
            Ask::LetIn(extensions) => {
                self.extensions = extensions;
                self.queues = Inlets::new(extensions.credit);
                self.host = Some(hub.join());
                self.guest = None;
            }
            Ask::Close { code, reason } => {
                self.outbox.close(code, reason);
                self.closing = true;
                self.due = Instant::now() + CLOSE_TIME_MAX;
            }
            Ask::Watch => {
                self.watch = Some(Watch::begin(self.settings.interval, self.settings.log.clone()));
            }
            Ask::Unwatch => self.watch = None,
            Ask::Connect { attempt, stream, port } => {
                let abort = self.dials.spawn(async move { (attempt, stream, dial(port).await) });
                self.aborts.insert(attempt, abort);
            }
            Ask::Abandon(attempt) => {
                if let Some(abort) = self.aborts.remove(&attempt) {
                    abort.abort();
                }
            }
            Ask::Relay(attempt, stream) => self.relay(attempt, stream),
            Ask::Deliver(stream, frame) => {
                if let Some(inlet) = self.inlets.get(&stream) {
                    inlet.deliver(frame);
                }
            }
            Ask::Forget(stream) => drop(self.inlets.remove(&stream)),
            Ask::Result(result) => {
                if let Some(host) = self.host {
                    hub.result(host, &result);
                }
            }
            Ask::Tell(event) => self.tell(event),
        }
    }

    fn tell(&self, event: ContainerEvent) {
        let is_refusal = matches!(event, ContainerEvent::AuthFailed { .. });
        let refusals = &self.settings.refusals;
        let is_logged = !is_refusal
            || refusals
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .admit(self.address, Instant::now().into_std());
        match is_logged {
            true => self.settings.log.tell(&AgentEvent::Host(event)),
            false => self.settings.log.omit(),
        }
    }

    fn relay(&mut self, attempt: Attempt, stream: StreamId) {
        let Some(socket) = self.dialled.take() else { return };
        let (inlet, outlet) = self.queues.inlet();
        self.inlets.insert(stream, inlet);
        let (outbox, extensions) = (self.outbox.clone(), self.extensions);
        self.pumps.spawn(async move {
            let ended = pump::relay(socket, stream, Side::Upstream, extensions, &outbox, outlet).await;
            (attempt, stream, ended)
        });
    }

    fn read(&self, incoming: Incoming) -> Heard {
        let message = match incoming {
            Incoming::Text(text) => {
                let message = ToContainer::from_text(text.as_str());
                if let Err(Unreadable::Field { kind: "relay-open", field: "port" }) = message
                    && let Some(stream) = stream_of(text.as_str())
                {
                    return Heard::UnfitOpen(stream);
                }
                message
            }
            Incoming::Binary(frame) if self.extensions.binary => {
                from_binary(frame).map(|frame| frame.map(|(stream, frame)| ToContainer::Relay(stream, frame)))
            }
            Incoming::Binary(_) | Incoming::Closed { .. } => {
                return Heard::Noise("a binary frame, which is no message".to_owned());
            }
        };
        match message {
            Ok(Some(message)) => Heard::Message(message),
            Ok(None) => Heard::OtherType,
            Err(Unreadable::Field { kind, .. } | Unreadable::TooLong { kind, .. })
                if kind == "broker-hello" =>
            {
                Heard::TokenlessHello
            }
            Err(error @ (Unreadable::Field { .. } | Unreadable::TooLong { .. })) => {
                Heard::Unfit(error.to_string())
            }
            Err(error @ (Unreadable::Json | Unreadable::CutShort)) => Heard::Noise(error.to_string()),
        }
    }

    /// Ends what the host had.
    async fn end(mut self) {
        self.session.gone().into_iter().for_each(|ask| self.obey(ask));
        if let Some(host) = self.host {
            self.settings.hub.leave(host);
        }
        let ends = async { while self.pumps.join_next().await.is_some() {} };
        // The rest is cut off.
        let _ = timeout(STREAMS_TIME_MAX, ends).await;
    }
}

/// The stream of a message whose other fields do not fit.
fn stream_of(text: &str) -> Option<StreamId> {
    serde_json::from_str::<Value>(text).ok()?["streamId"].as_i64().map(StreamId)
}
