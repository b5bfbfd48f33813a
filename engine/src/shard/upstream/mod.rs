//! A network namespace, as one shard reaches it: a channel, and the conversation over it. An opener makes sockets ahead of
//! need, which are kept in stock; a driver connects when it is asked to ([`Dials`]), and then there is no stock. The host's own
//! namespace needs neither, since the shard makes the sockets itself.
//!
//! The stock starts small. When it runs dry while a connection waits, its target doubles, up to a bound, so a busy dev
//! server soon has enough for a burst, and an idle container costs a few descriptors. One pooled socket keeps its namespace
//! alive, so a stock never outlives its upstream.
//!
//! The reactor reports only when the channel is ready; requests, answers and checks are handled here. Sockets are checked
//! when they arrive, while no client waits for them: each one from an agent, which is not trusted; of our own opener, which
//! cannot leave its namespace, the cookie of one socket of each answer.

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

/// The ephemeral ports of a kernel's default, in which a connect may meet itself even if the namespace reported others
/// earlier (`net/ipv4/af_inet.c`, inet_init_net()).
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
    /// The request that is unanswered; there is at most one.
    asking: Option<Asked>,
    /// The dials of a driver; absent where sockets are made ahead of need.
    pub(super) dials: Option<Dials>,
    /// The ephemeral ports that the opener reported last.
    ephemeral: Option<PortRange>,
    /// Descriptors ran out; it asks again at that time.
    pub(super) resting_until: Option<Instant>,
    /// It is removed when its listeners are closed.
    pub(super) closing: Option<Closing>,
}

/// Why an upstream closes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Closing {
    /// A sentence for people, where it was not requested.
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
    /// How many there should be.
    target: usize,
    /// The kernel inside has this family.
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

/// A failure of the conversation.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum UpstreamError {
    /// Descriptors ran out: a sentence for people. It is to be tried again after a pause.
    Exhausted(&'static str),
    /// The kernel inside has no sockets of this family.
    Unsupported(Family),
    /// The container cannot be reached any more: a sentence for people.
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
            resting_until: None,
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

    /// Takes a socket out of the stock.
    pub(super) fn take(&mut self, family: Family) -> Option<S> {
        self.stock(family).sockets.pop()
    }

    /// Whether sockets of this family can be made inside.
    pub(super) fn is_possible(&self, family: Family) -> bool {
        self.stocks[family as usize].possible
    }

    /// Whether a connect to `port` may meet itself: only an ephemeral port can be the socket's own. A namespace that does not
    /// report its ephemeral ports may have any.
    pub(super) fn may_meet_itself(&self, port: u16) -> bool {
        EPHEMERAL_DEFAULT.contains(port) || self.ephemeral.is_none_or(|range| range.contains(port))
    }

    /// Adds a connection to the queue for the next socket.
    pub(super) fn wait(&mut self, family: Family, connection: SlotId) {
        self.stock(family).waiting.push_back(connection);
    }

    /// Returns the next request, if a stock is low and a request is possible now.
    fn wanted(&mut self, limits: &Limits) -> Option<Asked> {
        if self.channel.is_none()
            || self.dials.is_some()
            || self.asking.is_some()
            || self.resting_until.is_some()
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

    /// Adds sockets to the stock and returns those that waiting connections get.
    pub(super) fn stocked(&mut self, family: Family, sockets: Vec<S>) -> Vec<(SlotId, S)> {
        let stock = self.stock(family);
        stock.sockets.extend(sockets);
        let served = stock.waiting.len().min(stock.sockets.len());
        let connections = stock.waiting.drain(..served);
        connections.zip(stock.sockets.drain(..served)).collect()
    }

    /// Notes that the kernel inside has no sockets of this family; returns the connections that waited for one.
    pub(super) fn impossible(&mut self, family: Family) -> Vec<SlotId> {
        let stock = self.stock(family);
        stock.possible = false;
        stock.waiting.drain(..).collect()
    }

    /// Closes every socket, so that the namespace can end; returns the connections that waited for one.
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

    /// Asks for sockets if a stock is low.
    pub(super) fn refill<P>(&mut self, reactor: &mut Reactor<P>, limits: &Limits) -> Result<(), UpstreamError>
    where
        P: Poller,
        P::Io: SocketIo<Socket = S>,
    {
        let Some(channel) = self.channel else { return Ok(()) };
        let Some(asked @ Asked { family, count }) = self.wanted(limits) else { return Ok(()) };
        let congestion = sys::congestion().map(str::to_owned);
        if send(reactor, channel, &Request::Sockets { family, count, congestion })
            .map_err(|error| self.failure(family, error))?
        {
            self.asking = Some(asked);
        }
        Ok(())
    }

    /// Sends the dials that are to be asked for, as far as the channel has room.
    pub(super) fn send_dials<P>(&mut self, reactor: &mut Reactor<P>) -> Result<(), UpstreamError>
    where
        P: Poller,
        P::Io: SocketIo<Socket = S>,
    {
        while let Some(dials) = &mut self.dials
            && let Some(channel) = self.channel
            && let Some((dial, port)) = dials.next_to_ask()
        {
            match send(reactor, channel, &Request::Dial { dial, port }) {
                Ok(true) => {}
                Ok(false) => {
                    // The channel reports when it has room again.
                    dials.ask_again(dial, port);
                    return Ok(());
                }
                Err(error) => return Err(self.failure(Family::V4, error)),
            }
        }
        Ok(())
    }

    /// Returns the next answer, if one is there.
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
            // One socket was lost on the way; the client that waits for it does so in vain, until its time is up.
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
