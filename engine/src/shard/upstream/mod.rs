//! An upstream of one shard: the channel, and the protocol on it. An opener creates sockets in advance, which are kept in
//! stock. A driver connects on request ([`Dials`]), without a stock. The host's own namespace needs no channel, since the
//! shard creates the sockets itself.
//!
//! The stock starts small. If it runs dry while a connection waits, its target doubles, up to a bound, so a busy dev server
//! soon has enough for a burst, and an idle container costs a few descriptors. A socket in stock keeps its namespace alive,
//! so the stock is closed with its upstream.
//!
//! The reactor reports only that the channel is ready; this module handles requests, answers and checks. Sockets are checked
//! when they arrive, before a client waits for them: each one from an untrusted agent; from landfall's opener, which cannot
//! leave its namespace, only the cookie of one socket of each answer.

mod dials;

use std::collections::VecDeque;
use std::time::Instant;

use crate::channel::ChannelError;
use crate::command::{Family, UpstreamId, UpstreamKind};
use crate::limits::{DESCRIPTORS_PER_MESSAGE_MAX, Limits};
use crate::opener::client::StockError;
use crate::opener::client::answers::{self, Dialled};
use crate::opener::{ANSWER_BYTES_MAX, DialFailure, PortRange, Request};
use crate::reactor::{Key, Poller, Reactor, SocketIo, SocketOf};
use crate::sys;
use crate::table::SlotId;
pub(super) use dials::Dials;

/// The default range of ephemeral ports. A connect to one of these may reach its own socket even if the namespace reported
/// another range earlier (`net/ipv4/af_inet.c`, inet_init_net()).
const EPHEMERAL_DEFAULT: PortRange = PortRange { first: 32_768, last: 60_999 };

/// An upstream in a shard's table.
#[derive(Debug)]
pub(super) struct Upstream<S> {
    pub(super) id: UpstreamId,
    kind: UpstreamKind,
    /// Absent for the host, and once it is closing.
    pub(super) channel: Option<Key>,
    netns_cookie: u64,
    stocks: [Stock<S>; 2],
    /// The unanswered request; there is at most one.
    asking: Option<Asked>,
    /// The dials of a driver; absent where sockets are created in advance.
    pub(super) dials: Option<Dials>,
    /// The ephemeral ports in the opener's last report.
    ephemeral: Option<PortRange>,
    /// The end of a pause after descriptors ran out.
    pub(super) paused_until: Option<Instant>,
    /// Present when the upstream is to be removed after its listeners are closed.
    pub(super) closing: Option<Closing>,
}

/// The reason why an upstream closes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Closing {
    /// A sentence for people; absent if the close was requested.
    pub(super) reason: Option<String>,
}

/// A request for sockets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Asked {
    family: Family,
    count: u16,
}

#[derive(Debug)]
struct Stock<S> {
    sockets: Vec<S>,
    /// The number of sockets to keep.
    target: usize,
    /// Whether the kernel inside has this family.
    possible: bool,
    /// Connections that wait for a socket, the oldest first.
    waiting: VecDeque<SlotId>,
}

/// One answer over the channel.
#[derive(Debug)]
pub(super) enum Answer<S> {
    /// Sockets for the stock of a family.
    Sockets(Family, Vec<S>),
    /// The result of a dial.
    Dialled(u64, Result<S, DialFailure>),
}

/// A failure on the channel.
/// Descriptors ran out: a sentence for people. The request is repeated after a pause.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum UpstreamError {
    /// Descriptors ran out: a sentence for people. It is to be tried again after a pause.
    Exhausted(&'static str),
    /// The kernel inside has no sockets of this family.
    Unsupported(Family),
    /// The container is no longer reachable: a sentence for people.
    Lost(String),
}

impl<S> Upstream<S> {
    pub(super) fn new(
        id: UpstreamId,
        kind: UpstreamKind,
        channel: Option<Key>,
        netns_cookie: u64,
        limits: &Limits,
    ) -> Upstream<S> {
        let stock = || Stock {
            sockets: Vec::new(),
            target: limits.stock_min,
            possible: true,
            waiting: VecDeque::new(),
        };
        Upstream {
            id,
            kind,
            channel,
            netns_cookie,
            stocks: [stock(), stock()],
            asking: None,
            dials: (kind == UpstreamKind::Dialler).then(Dials::default),
            ephemeral: None,
            paused_until: None,
            closing: None,
        }
    }

    /// Whether it is the host's own namespace.
    pub(super) fn is_host(&self) -> bool {
        self.kind == UpstreamKind::Host
    }

    /// Whether connections may use it.
    pub(super) fn is_open(&self) -> bool {
        self.closing.is_none()
    }

    fn stock(&mut self, family: Family) -> &mut Stock<S> {
        &mut self.stocks[family as usize]
    }

    /// Takes a socket from the stock.
    pub(super) fn take(&mut self, family: Family) -> Option<S> {
        self.stock(family).sockets.pop()
    }

    /// Whether sockets of this family can be created inside.
    pub(super) fn is_possible(&self, family: Family) -> bool {
        self.stocks[family as usize].possible
    }

    /// Whether a connect to `port` may reach the socket itself: only an ephemeral port can be the socket's own. If the
    /// namespace does not report its ephemeral ports, any port may be one.
    pub(super) fn may_connect_to_itself(&self, port: u16) -> bool {
        EPHEMERAL_DEFAULT.contains(port) || self.ephemeral.is_none_or(|range| range.contains(port))
    }

    /// Adds a connection to the queue for the next socket.
    pub(super) fn wait(&mut self, family: Family, connection: SlotId) {
        self.stock(family).waiting.push_back(connection);
    }

    /// Returns the next request, if a stock is low and a request is possible now.
    fn next_request(&mut self, limits: &Limits) -> Option<Asked> {
        if self.channel.is_none()
            || self.dials.is_some()
            || self.asking.is_some()
            || self.paused_until.is_some()
            || self.closing.is_some()
        {
            return None;
        }
        // The longest queue first, then the lowest stock.
        let family = Family::ALL
            .into_iter()
            .filter(|family| self.stocks[*family as usize].is_low())
            .max_by_key(|family| self.stocks[*family as usize].waiting.len())?;
        let stock = self.stock(family);
        if !stock.waiting.is_empty() {
            stock.target = (stock.target * 2).min(limits.stock_max);
        }
        let missing =
            (stock.target + stock.waiting.len().min(limits.stock_max)).saturating_sub(stock.sockets.len());
        let count = missing.clamp(1, DESCRIPTORS_PER_MESSAGE_MAX);
        Some(Asked { family, count: u16::try_from(count).unwrap_or(1) })
    }

    /// Adds sockets to the stock, and returns the waiting connections with the sockets that they get.
    pub(super) fn stocked(&mut self, family: Family, sockets: Vec<S>) -> Vec<(SlotId, S)> {
        let stock = self.stock(family);
        stock.sockets.extend(sockets);
        let served = stock.waiting.len().min(stock.sockets.len());
        let connections = stock.waiting.drain(..served);
        connections.zip(stock.sockets.drain(..served)).collect()
    }

    /// Records that the kernel inside has no sockets of this family. Returns the connections that waited for one.
    pub(super) fn impossible(&mut self, family: Family) -> Vec<SlotId> {
        let stock = self.stock(family);
        stock.possible = false;
        stock.waiting.drain(..).collect()
    }

    /// Closes every socket, so that the namespace can end. Returns the connections that waited for one.
    pub(super) fn close(&mut self, reason: Option<String>) -> Vec<SlotId> {
        self.closing = Some(Closing { reason });
        let mut waiting = Vec::new();
        for stock in &mut self.stocks {
            stock.sockets.clear();
            waiting.extend(stock.waiting.drain(..));
        }
        waiting.extend(self.dials.iter_mut().flat_map(Dials::end_all));
        waiting
    }

    /// Requests sockets if a stock is low.
    pub(super) fn refill<P>(&mut self, reactor: &mut Reactor<P>, limits: &Limits) -> Result<(), UpstreamError>
    where
        P: Poller,
        P::Io: SocketIo<Socket = S>,
    {
        let Some(channel) = self.channel else { return Ok(()) };
        let Some(asked @ Asked { family, count }) = self.next_request(limits) else { return Ok(()) };
        let congestion = sys::congestion().map(str::to_owned);
        if send(reactor, channel, &Request::Sockets { family, count, congestion })
            .map_err(|error| self.failure(family, error))?
        {
            self.asking = Some(asked);
        }
        Ok(())
    }

    /// Sends the unsent dials while the channel has room.
    pub(super) fn send_dials<P>(&mut self, reactor: &mut Reactor<P>) -> Result<(), UpstreamError>
    where
        P: Poller,
        P::Io: SocketIo<Socket = S>,
    {
        while let Some(dials) = &mut self.dials
            && let Some(channel) = self.channel
            && let Some((dial, port)) = dials.next_unsent()
        {
            match send(reactor, channel, &Request::Dial { dial, port }) {
                Ok(true) => {}
                Ok(false) => {
                    // The channel reports when it has room again.
                    dials.put_back(dial, port);
                    return Ok(());
                }
                Err(error) => return Err(self.failure(Family::V4, error)),
            }
        }
        Ok(())
    }

    /// Returns the next answer, if one has arrived.
    pub(super) fn next_answer<P>(
        &mut self,
        reactor: &mut Reactor<P>,
    ) -> Result<Option<Answer<S>>, UpstreamError>
    where
        P: Poller,
        P::Io: SocketIo<Socket = S>,
    {
        let Some(channel) = self.channel else { return Ok(None) };
        let received = match reactor.receive_message(channel, ANSWER_BYTES_MAX) {
            Err(ChannelError::WouldBlock) => return Ok(None),
            received => received.map_err(StockError::from),
        };
        if self.dials.is_some() {
            let answer = received.and_then(|(text, sockets)| dialled(reactor, &text, sockets));
            let Dialled { dial, result } = answer.map_err(|error| self.failure(Family::V4, error))?;
            return Ok(Some(Answer::Dialled(dial, result)));
        }
        let asked = self.asking.take();
        let family = asked.map_or(Family::V4, |asked| asked.family);
        let (kind, cookie) = (self.kind, self.netns_cookie);
        let answer = received.and_then(|(text, sockets)| match asked {
            Some(asked) => made(reactor, kind, asked, cookie, &text, sockets),
            None => Err(StockError::Hostile("an answer without a request".to_owned())),
        });
        let answers::Made { sockets, ephemeral } = answer.map_err(|error| self.failure(family, error))?;
        self.ephemeral = ephemeral;
        Ok(Some(Answer::Sockets(family, sockets)))
    }

    fn failure(&self, family: Family, error: StockError) -> UpstreamError {
        match (self.kind, error) {
            // One socket was lost on arrival; the client that waits for it is reset after its time limit.
            (UpstreamKind::Dialler, StockError::Exhausted(_)) => UpstreamError::Exhausted(
                "no descriptors are left for connections, so some are reset (ulimit -n)",
            ),
            (_, StockError::Exhausted(_)) => UpstreamError::Exhausted(
                "no descriptors are left for sockets inside, so new connections wait (ulimit -n)",
            ),
            (UpstreamKind::Dialler, StockError::Gone) => UpstreamError::Lost(
                "the program that connects for it has ended, so the container can no longer be reached"
                    .to_owned(),
            ),
            (UpstreamKind::Dialler, StockError::Hostile(what)) => {
                UpstreamError::Lost(format!("the answer to a dial was invalid: {what}"))
            }
            (UpstreamKind::Opener | UpstreamKind::Agent | UpstreamKind::Host, StockError::Refused(_)) => {
                UpstreamError::Unsupported(family)
            }
            (UpstreamKind::Opener | UpstreamKind::Agent | UpstreamKind::Host, StockError::Gone) => {
                UpstreamError::Lost(
                    "the opener has ended, so the container can no longer be entered".to_owned(),
                )
            }
            (_, error) => UpstreamError::Lost(error.to_string()),
        }
    }
}

impl<S> Stock<S> {
    fn is_low(&self) -> bool {
        self.possible && (!self.waiting.is_empty() || self.sockets.len() * 2 <= self.target)
    }
}

/// Sends a request. False while the channel is full.
fn send<P: Poller>(reactor: &mut Reactor<P>, channel: Key, request: &Request) -> Result<bool, StockError> {
    let Ok(text) = serde_json::to_vec(request) else {
        return Err(StockError::Hostile("the request cannot be written".to_owned()));
    };
    match reactor.on_socket(channel, |io, socket| io.send_message(socket, &text)) {
        Some(Ok(())) => Ok(true),
        Some(Err(ChannelError::WouldBlock)) => Ok(false),
        Some(Err(_)) | None => Err(StockError::Gone),
    }
}

/// Parses and checks the answer to a request for sockets.
fn made<P: Poller>(
    reactor: &mut Reactor<P>,
    kind: UpstreamKind,
    asked: Asked,
    netns_cookie: u64,
    text: &[u8],
    sockets: Vec<SocketOf<P>>,
) -> Result<answers::Made<SocketOf<P>>, StockError> {
    let io = &*reactor.io();
    let trusted = kind == UpstreamKind::Opener;
    if trusted
        && let Some(socket) = sockets.first()
        && io.netns_cookie(socket) != Some(netns_cookie)
    {
        return Err(StockError::Hostile("a socket of another network namespace".to_owned()));
    }
    answers::made(asked.count, text, sockets, |socket| match trusted {
        true => Ok(()),
        false => answers::check_unused(&io.facts(socket), asked.family, netns_cookie),
    })
}

/// Parses and checks the answer to a dial, and prepares its socket.
fn dialled<P: Poller>(
    reactor: &mut Reactor<P>,
    text: &[u8],
    sockets: Vec<SocketOf<P>>,
) -> Result<Dialled<SocketOf<P>>, StockError> {
    let io = reactor.io();
    sockets.iter().for_each(|socket| io.tune(socket));
    answers::dialled(text, sockets, |socket| answers::check_connected(&io.facts(socket)))
}
