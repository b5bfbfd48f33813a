//! One host's WebSocket: the I/O shell around the session machine ([`crate::broker::container`]). It reads, writes,
//! connects and watches as the machine's actions request, and makes no decisions.

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
use crate::broker::container::{Action, Attempt, ContainerEvent, HELLO_TIME_MAX, ReceivedMessage, Session};
use crate::broker::message::{Extensions, Side, StreamId, ToContainer, Unreadable, from_binary};
use crate::broker::outbox::{Outbox, outbox};
use crate::broker::pump::{self, Ended, Inlet, Inlets};
use crate::broker::wire::{Incoming, Reader, Socket, WireError};
use crate::model::registration::Token;

/// The time for a refused host to close its side. Closing a connection with unread input sends a reset, which may
/// destroy the last messages.
const CLOSE_TIME_MAX: Duration = Duration::from_secs(2);
/// The time for streams to end after their WebSocket has ended. They only write data that arrived before.
const STREAMS_TIME_MAX: Duration = Duration::from_secs(1);
/// The close code of a server that ends (RFC 6455, 7.4.1).
const GOING_AWAY: u16 = 1001;

/// Serves a host until either side closes.
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
        // The end of the writer ends the connection.
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
    /// The address of the host.
    address: IpAddr,
    /// The place in the accept queue, until the host is accepted.
    guest: Option<QueuePlace>,
    host: Option<HostId>,
    extensions: Extensions,
    queues: Inlets,
    inlets: HashMap<StreamId, Inlet>,
    watch: Option<Watch>,
    dials: JoinSet<Dialled>,
    aborts: HashMap<Attempt, AbortHandle>,
    /// The socket of the connect outcome that is being handled.
    dialled: Option<TcpStream>,
    pumps: JoinSet<(Attempt, StreamId, Ended)>,
    /// The deadline of the hello, or of the peer's close after our close.
    due: Instant,
    closing: bool,
}

/// The next event.
enum Next {
    Incoming(Result<Incoming, WireError>),
    Listens(Vec<landfall_engine::watch::parse::WireListener>),
    Dialled(Dialled),
    Over((Attempt, StreamId, Ended)),
    Nothing,
    Requested,
    Due,
    Stop,
    /// Writing has ended, or the place is needed for a newer connection.
    Gone,
}

impl Connection<'_> {
    async fn run(&mut self, mut reader: Reader, stopping: CancellationToken) {
        loop {
            let actions = match self.next(&mut reader, &stopping).await {
                Next::Incoming(Ok(Incoming::Closed { .. })) => {
                    // The answer to the close is written while the next message is awaited.
                    let _ = timeout(CLOSE_TIME_MAX, reader.next()).await;
                    return;
                }
                Next::Incoming(Err(_)) | Next::Gone => return,
                Next::Due if self.closing => return,
                Next::Nothing => continue,
                Next::Incoming(Ok(_)) if self.closing => continue,
                Next::Incoming(Ok(incoming)) => {
                    let received = self.read(incoming);
                    self.settings.hub.with_reserved(|reserved| self.session.on_message(received, reserved))
                }
                Next::Listens(reading) => self.session.on_reading(reading),
                Next::Dialled((attempt, stream, outcome)) => {
                    self.aborts.remove(&attempt);
                    let outcome = outcome.map(|socket| self.dialled = Some(socket));
                    self.session.on_connect_outcome(attempt, stream, outcome)
                }
                Next::Over((attempt, stream, ended)) => {
                    let overflown = "the server reads too slowly, and its queue is full";
                    let error = (ended == Ended::Overflown).then(|| overflown.to_owned());
                    self.session.on_pump_end(attempt, stream, error)
                }
                Next::Requested => {
                    self.settings.hub.with_reserved(|reserved| self.session.on_request(reserved))
                }
                Next::Due => self.session.on_hello_timeout(),
                Next::Stop => vec![Action::Close { code: GOING_AWAY, reason: "the agent ends" }],
            };
            actions.into_iter().for_each(|action| self.perform(action));
            // A socket that no stream has taken is closed.
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
            // A connect task that was aborted or has panicked has no outcome.
            Some(dialled) = dials.join_next() => dialled.map_or(Next::Nothing, Next::Dialled),
            Some(over) = pumps.join_next() => over.map_or(Next::Nothing, Next::Over),
            Ok(()) = requests.changed() => Next::Requested,
            () = sleep_until(self.due), if waits_for_time => Next::Due,
            () = stopping.cancelled(), if !self.closing => Next::Stop,
            () = evicted => Next::Gone,
            _ = writing.join_next(), if !self.closing => Next::Gone,
        }
    }

    fn perform(&mut self, action: Action) {
        let hub = &self.settings.hub;
        match action {
            Action::Send(message) => self.outbox.send_control(message.to_text()),
            Action::Accept(extensions) => {
                self.extensions = extensions;
                self.queues = Inlets::new(extensions.credit);
                self.host = Some(hub.join());
                self.guest = None;
            }
            Action::Close { code, reason } => {
                self.outbox.close(code, reason);
                self.closing = true;
                self.due = Instant::now() + CLOSE_TIME_MAX;
            }
            Action::Watch => {
                self.watch = Some(Watch::begin(self.settings.interval, self.settings.log.clone()));
            }
            Action::StopWatch => self.watch = None,
            Action::Connect { attempt, stream, port } => {
                let abort = self.dials.spawn(async move { (attempt, stream, dial(port).await) });
                self.aborts.insert(attempt, abort);
            }
            Action::Abandon(attempt) => {
                if let Some(abort) = self.aborts.remove(&attempt) {
                    abort.abort();
                }
            }
            Action::Relay(attempt, stream) => self.relay(attempt, stream),
            Action::Deliver(stream, frame) => {
                if let Some(inlet) = self.inlets.get(&stream) {
                    inlet.deliver(frame);
                }
            }
            Action::Forget(stream) => drop(self.inlets.remove(&stream)),
            Action::Result(result) => {
                if let Some(host) = self.host {
                    hub.result(host, &result);
                }
            }
            Action::Log(event) => self.record(event),
        }
    }

    fn record(&self, event: ContainerEvent) {
        let is_refusal = matches!(event, ContainerEvent::AuthFailed { .. });
        let refusals = &self.settings.refusals;
        let is_logged = !is_refusal
            || refusals
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .admit(self.address, Instant::now().into_std());
        match is_logged {
            true => self.settings.log.record(&AgentEvent::Host(event)),
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

    fn read(&self, incoming: Incoming) -> ReceivedMessage {
        let message = match incoming {
            Incoming::Text(text) => {
                let message = ToContainer::from_text(text.as_str());
                if let Err(Unreadable::Field { kind: "relay-open", field: "port" }) = message
                    && let Some(stream) = stream_of(text.as_str())
                {
                    return ReceivedMessage::InvalidOpen(stream);
                }
                message
            }
            Incoming::Binary(frame) if self.extensions.binary => {
                from_binary(frame).map(|frame| frame.map(|(stream, frame)| ToContainer::Relay(stream, frame)))
            }
            Incoming::Binary(_) | Incoming::Closed { .. } => {
                return ReceivedMessage::NotAMessage(
                    "a binary frame, which is not a message here".to_owned(),
                );
            }
        };
        match message {
            Ok(Some(message)) => ReceivedMessage::Message(message),
            Ok(None) => ReceivedMessage::UnknownType,
            Err(Unreadable::Field { kind, .. } | Unreadable::TooLong { kind, .. })
                if kind == "broker-hello" =>
            {
                ReceivedMessage::TokenlessHello
            }
            Err(error @ (Unreadable::Field { .. } | Unreadable::TooLong { .. })) => {
                ReceivedMessage::InvalidFields(error.to_string())
            }
            Err(error @ (Unreadable::Json | Unreadable::CutShort)) => {
                ReceivedMessage::NotAMessage(error.to_string())
            }
        }
    }

    /// Ends the streams and the watch of the host.
    async fn end(mut self) {
        self.session.on_disconnect().into_iter().for_each(|action| self.perform(action));
        if let Some(host) = self.host {
            self.settings.hub.leave(host);
        }
        let ends = async { while self.pumps.join_next().await.is_some() {} };
        // Remaining streams are aborted.
        let _ = timeout(STREAMS_TIME_MAX, ends).await;
    }
}

/// Returns the stream of a message whose other fields are invalid.
fn stream_of(text: &str) -> Option<StreamId> {
    serde_json::from_str::<Value>(text).ok()?["streamId"].as_i64().map(StreamId)
}
