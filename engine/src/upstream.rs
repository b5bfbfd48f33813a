//! The way into a container, as one shard has it: an opener channel and a stock of sockets made there ahead of need; or a
//! channel to a driver that dials when it is asked to ([`Dials`]), and then there is no stock.
//!
//! The stock begins small. When it runs dry while a connection waits, it is twice as large from then on, up to a bound,
//! so a busy dev server soon has what a burst takes, and an idle container costs a handful of descriptors. One pooled
//! socket keeps its namespace alive, so a stock never outlives its upstream.

mod dials;

use std::collections::VecDeque;
use std::time::Instant;

use crate::command::{Family, UpstreamId, UpstreamKind};
use crate::limits::Limits;
use crate::ring::OpKey;
use crate::table::SlotId;
pub(crate) use dials::Dials;

/// An upstream in a shard's table.
#[derive(Debug)]
pub(crate) struct Upstream<S> {
    pub(crate) id: UpstreamId,
    pub(crate) channel: S,
    pub(crate) netns_cookie: u64,
    stocks: [Stock<S>; 2],
    /// The family of the request in flight; a channel answers one at a time.
    pub(crate) asking: Option<(Family, OpKey)>,
    /// What a driver is to dial; none where sockets are made ahead of need.
    pub(crate) dials: Option<Dials>,
    /// The watch for the opener's end.
    pub(crate) watch: Option<OpKey>,
    /// Descriptors ran out; it asks again at that time.
    pub(crate) resting_until: Option<Instant>,
    /// Nothing new goes in; it is removed when nothing is in flight.
    pub(crate) closing: Option<Closing>,
}

/// Why an upstream goes away.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Closing {
    /// A sentence for people, where nobody asked for it.
    pub(crate) reason: Option<String>,
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

impl<S> Upstream<S> {
    pub(crate) fn new(
        id: UpstreamId,
        kind: UpstreamKind,
        channel: S,
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
            channel,
            netns_cookie,
            stocks: [stock(), stock()],
            asking: None,
            dials: (kind == UpstreamKind::Dialler).then(Dials::default),
            watch: None,
            resting_until: None,
            closing: None,
        }
    }

    fn stock(&mut self, family: Family) -> &mut Stock<S> {
        &mut self.stocks[family as usize]
    }

    /// Takes a socket out of the stock.
    pub(crate) fn take(&mut self, family: Family) -> Option<S> {
        self.stock(family).sockets.pop()
    }

    /// Whether sockets of this family can be made inside.
    pub(crate) fn is_possible(&self, family: Family) -> bool {
        self.stocks[family as usize].possible
    }

    /// Puts a connection into the queue for the next socket.
    pub(crate) fn wait(&mut self, family: Family, connection: SlotId) {
        self.stock(family).waiting.push_back(connection);
    }

    /// The next family to ask for and how many, if any stock is low and nothing hinders.
    pub(crate) fn wanted(&mut self, limits: &Limits) -> Option<(Family, u16)> {
        if self.dials.is_some()
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
        let count = missing.clamp(1, crate::limits::DESCRIPTORS_PER_MESSAGE_MAX);
        Some((family, u16::try_from(count).unwrap_or(1)))
    }

    /// Puts sockets into the stock and gives out the connections that may go on.
    pub(crate) fn stocked(&mut self, family: Family, sockets: Vec<S>) -> Vec<(SlotId, S)> {
        let stock = self.stock(family);
        stock.sockets.extend(sockets);
        let served = stock.waiting.len().min(stock.sockets.len());
        let connections = stock.waiting.drain(..served);
        connections.zip(stock.sockets.drain(..served)).collect()
    }

    /// The kernel inside does not make sockets of this family; gives out the connections that waited for one.
    pub(crate) fn impossible(&mut self, family: Family) -> Vec<SlotId> {
        let stock = self.stock(family);
        stock.possible = false;
        stock.waiting.drain(..).collect()
    }

    /// Everything that is in flight.
    pub(crate) fn in_flight(&self) -> impl Iterator<Item = OpKey> {
        let stock = self.asking.map(|(_, key)| key);
        let dials = self.dials.iter().flat_map(|dials| [dials.asking, dials.hearing]);
        [self.watch, stock].into_iter().chain(dials).flatten()
    }

    /// Lets go of every socket, so that the namespace can end; gives out the connections that waited for one.
    pub(crate) fn let_go(&mut self, reason: Option<String>) -> Vec<SlotId> {
        self.closing = Some(Closing { reason });
        let mut waiting = Vec::new();
        for stock in &mut self.stocks {
            stock.sockets.clear();
            waiting.extend(stock.waiting.drain(..));
        }
        waiting.extend(self.dials.iter_mut().flat_map(Dials::end_all));
        waiting
    }
}

impl<S> Stock<S> {
    fn is_low(&self) -> bool {
        self.possible && (!self.waiting.is_empty() || self.sockets.len() * 2 <= self.target)
    }
}
