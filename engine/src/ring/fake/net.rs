//! A network in memory: TCP as far as a relay can tell it apart, and the far ends that a simulation drives.
//!
//! What is modelled is what Linux does and a relay can see:
//!
//! - Bytes wait in the sender's queue until the receiver's window has room; those are the unacknowledged ones.
//! - A reset throws away the sender's queue, never what the receiver already has. The receiver reads that first, then the
//!   error, which is told once (`sock_error()`), to a read or to a send; a read after that sees an end.
//! - An end that came before a reset is seen in its place (`SOCK_DONE` is looked at before `sk_err`).
//! - A close with unread bytes is a reset; so is the arrival of bytes at what was closed.
//! - A listener that closes resets those it has not accepted.

use std::cell::{RefCell, RefMut};
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::{Duration, Instant};

use super::bytes::{Bytes, Run};
use super::dials::AskedDial;
use super::faults::{Dice, Faults, Knob};
use crate::command::Family;
use crate::sys::SocketError;
use crate::table::SlotId;

/// One end of a connection, by number.
pub type EndId = usize;

/// The network and its clock.
#[derive(Debug)]
pub struct Net {
    pub(super) now: Instant,
    pub(super) turns: u64,
    pub(super) dice: Dice,
    pub(super) faults: Faults,
    pub(super) ends: Vec<End>,
    pub(super) listeners: Vec<HostListener>,
    pub(super) namespaces: BTreeMap<u64, Namespace>,
    newcomers: Vec<Newcomer>,
    /// When the simulation wants to act next.
    pub(super) act_at: Option<Instant>,
    /// Senders whose bytes are taken in late.
    held: Vec<(Instant, EndId)>,
    /// The relay's two ends of a connection, by the table entry that works on them.
    links: HashMap<SlotId, [Option<EndId>; 2]>,
    descriptors: usize,
    pub(super) deadlocked: bool,
    /// Something reached an end, perhaps a far one, since the last look.
    pub(super) stirred: bool,
}

#[derive(Debug)]
pub(super) struct HostListener {
    port: u16,
    family: Family,
    pub(super) queue: VecDeque<EndId>,
    open: bool,
}

#[derive(Debug, Default)]
pub(super) struct Namespace {
    servers: BTreeMap<SocketAddr, usize>,
    pub(super) gone: bool,
    /// What a driver was asked to dial there and has not answered.
    pub(super) dials: Vec<AskedDial>,
}

/// A connection that reached a server inside.
#[derive(Clone, Copy, Debug)]
pub struct Newcomer {
    /// The server's end.
    pub end: EndId,
    /// `SO_NETNS_COOKIE` of where.
    pub namespace: u64,
    /// Which server.
    pub address: SocketAddr,
}

/// What a far end reads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FarRead {
    /// Nothing yet.
    Empty,
    /// Bytes.
    Bytes(Bytes),
    /// A FIN.
    Eof,
    /// A reset.
    Reset,
}

#[derive(Debug)]
pub(super) struct End {
    peer: Option<EndId>,
    /// Where the socket was made; `None` for the host.
    pub(super) namespace: Option<u64>,
    pub(super) family: Family,
    inbox: Bytes,
    outbox: Bytes,
    /// How much the inbox holds.
    window: usize,
    /// How much the outbox holds.
    send_buffer: usize,
    /// Bytes that ever came into the inbox.
    arrived: u64,
    fin_sent: bool,
    fin_in: bool,
    broken: bool,
    error_untold: bool,
    closed: bool,
    pub(super) reset_on_close: bool,
    pub(super) own_peer: bool,
    held: bool,
    /// The relay's other end of the same relayed connection.
    partner: Option<EndId>,
}

/// What a simulated descriptor is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum What {
    End(EndId),
    Listener(usize),
    /// An opener channel into a namespace.
    Channel(u64),
    /// A channel to a driver that dials into a namespace.
    Driver(u64),
    /// A real descriptor that was adopted: nothing can be done with it here.
    Adopted,
}

/// A simulated descriptor. Dropping the last clone closes it.
#[derive(Clone, Debug)]
pub struct FakeSocket(pub(super) Rc<Descriptor>);

pub(super) struct Descriptor {
    net: FakeNet,
    pub(super) what: What,
}

impl std::fmt::Debug for Descriptor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.what.fmt(f)
    }
}

impl Drop for Descriptor {
    fn drop(&mut self) {
        let mut net = self.net.net();
        net.descriptors -= 1;
        match self.what {
            What::End(id) => net.close(id),
            What::Listener(index) => net.close_listener(index),
            What::Channel(_) | What::Driver(_) | What::Adopted => {}
        }
    }
}

/// The handle by which a simulation and a ring share a network.
#[derive(Clone, Debug)]
pub struct FakeNet(Rc<RefCell<Net>>);

impl FakeNet {
    /// An empty network.
    pub fn new(seed: u64, faults: Faults) -> FakeNet {
        FakeNet(Rc::new(RefCell::new(Net {
            now: Instant::now(),
            turns: 0,
            dice: Dice::new(seed),
            faults,
            ends: Vec::new(),
            listeners: Vec::new(),
            namespaces: BTreeMap::new(),
            newcomers: Vec::new(),
            act_at: None,
            held: Vec::new(),
            links: HashMap::new(),
            descriptors: 0,
            deadlocked: false,
            stirred: false,
        })))
    }

    /// The network itself. Not to be held across a call of the shard, nor while a [`FakeSocket`] is dropped.
    pub fn net(&self) -> RefMut<'_, Net> {
        self.0.borrow_mut()
    }

    pub(super) fn descriptor(&self, what: What) -> FakeSocket {
        self.net().descriptors += 1;
        FakeSocket(Rc::new(Descriptor { net: self.clone(), what }))
    }

    /// A listening socket on the host.
    pub fn listen(&self, port: u16, family: Family) -> FakeSocket {
        let mut net = self.net();
        net.listeners.push(HostListener { port, family, queue: VecDeque::new(), open: true });
        let index = net.listeners.len() - 1;
        drop(net);
        self.descriptor(What::Listener(index))
    }

    /// An opener channel into a namespace, which comes to be with the first one.
    pub fn channel(&self, namespace: u64) -> FakeSocket {
        self.net().namespaces.entry(namespace).or_default();
        self.descriptor(What::Channel(namespace))
    }

    /// A channel to a driver that dials into a namespace, which comes to be with the first one.
    pub fn driver(&self, namespace: u64) -> FakeSocket {
        self.net().namespaces.entry(namespace).or_default();
        self.descriptor(What::Driver(namespace))
    }
}

impl Net {
    /// The virtual time.
    pub fn now(&self) -> Instant {
        self.now
    }

    /// How often the ring was turned.
    pub fn turns(&self) -> u64 {
        self.turns
    }

    /// Descriptors open on the relay's side.
    pub fn descriptors(&self) -> usize {
        self.descriptors
    }

    /// Whether a turn found that nothing will ever happen again.
    pub fn is_deadlocked(&self) -> bool {
        self.deadlocked
    }

    /// The knobs.
    pub fn faults(&self) -> &Faults {
        &self.faults
    }

    /// Tells when the simulation has something to do next.
    pub fn act_at(&mut self, at: Option<Instant>) {
        self.act_at = at;
        self.deadlocked = false;
    }

    /// A server begins to listen inside; its connections have windows of `window` bytes.
    pub fn serve(&mut self, namespace: u64, address: SocketAddr, window: usize) {
        self.namespaces.entry(namespace).or_default().servers.insert(address, window);
    }

    /// A server ends.
    pub fn stop_serving(&mut self, namespace: u64, address: SocketAddr) {
        self.namespaces.entry(namespace).or_default().servers.remove(&address);
    }

    /// The opener of a namespace ends.
    pub fn end_opener(&mut self, namespace: u64) {
        self.namespaces.entry(namespace).or_default().gone = true;
    }

    /// A client connects to a host port; `None`: nobody listens.
    pub fn dial(&mut self, port: u16, family: Family, window: usize) -> Option<EndId> {
        let listener = self
            .listeners
            .iter()
            .position(|listener| listener.open && listener.port == port && listener.family == family)?;
        let client = self.end(None, family, window);
        let near_window = self.dice.size(1, 5000);
        let near = self.end(None, family, near_window);
        self.join(client, near);
        self.listeners[listener].queue.push_back(near);
        Some(client)
    }

    /// Connections that reached a server since the last call.
    pub fn newcomers(&mut self) -> Vec<Newcomer> {
        std::mem::take(&mut self.newcomers)
    }

    pub(super) fn end(&mut self, namespace: Option<u64>, family: Family, window: usize) -> EndId {
        let send_buffer = self.dice.size(1, 6000);
        self.ends.push(End {
            peer: None,
            namespace,
            family,
            inbox: Bytes::default(),
            outbox: Bytes::default(),
            window,
            send_buffer,
            arrived: 0,
            fin_sent: false,
            fin_in: false,
            broken: false,
            error_untold: false,
            closed: false,
            reset_on_close: false,
            own_peer: false,
            held: false,
            partner: None,
        });
        self.ends.len() - 1
    }

    fn join(&mut self, one: EndId, other: EndId) {
        self.ends[one].peer = Some(other);
        self.ends[other].peer = Some(one);
    }

    /// Whether a server listens there.
    pub(super) fn is_served(&self, namespace: u64, address: SocketAddr) -> bool {
        self.namespaces.get(&namespace).is_some_and(|namespace| namespace.servers.contains_key(&address))
    }

    /// Joins an unconnected end to the server at `address`.
    pub(super) fn reach(&mut self, end: EndId, namespace: u64, address: SocketAddr) -> bool {
        let servers = self.namespaces.get(&namespace).map(|namespace| &namespace.servers);
        let Some(window) = servers.and_then(|servers| servers.get(&address)).copied() else { return false };
        let server = self.end(Some(namespace), self.ends[end].family, window);
        self.join(end, server);
        self.newcomers.push(Newcomer { end: server, namespace, address });
        true
    }

    /// Remembers that one table entry works on this end.
    pub(super) fn link(&mut self, entry: SlotId, side: usize, end: EndId) {
        let pair = self.links.entry(entry).or_default();
        pair[side] = Some(end);
        if let [Some(one), Some(other)] = *pair {
            self.ends[one].partner = Some(other);
            self.ends[other].partner = Some(one);
        }
    }

    /// The relay's end that a far end talks to.
    pub fn near(&self, far: EndId) -> Option<EndId> {
        self.ends[far].peer
    }

    /// The far end at the other side of the relay, once the relay has begun to relay.
    pub fn opposite(&self, far: EndId) -> Option<EndId> {
        let partner = self.ends[self.ends[far].peer?].partner?;
        self.ends[partner].peer
    }

    /// Bytes that ever arrived at an end.
    pub fn arrived(&self, end: EndId) -> u64 {
        self.ends[end].arrived
    }

    /// Whether a reset has reached an end, or been sent by it.
    pub fn is_broken(&self, end: EndId) -> bool {
        self.ends[end].broken
    }

    /// Whether the relay has closed its descriptor of this end, or a simulation its own.
    pub fn is_closed(&self, end: EndId) -> bool {
        self.ends[end].closed
    }
}

/// What both a far end and the ring do with an end.
impl Net {
    /// Queues bytes as far as there is room.
    pub(super) fn send(&mut self, id: EndId, bytes: &mut Bytes, most: usize) -> Result<usize, SocketError> {
        let end = &mut self.ends[id];
        if end.broken || end.fin_sent || end.peer.is_none() {
            end.error_untold = false;
            return Err(SocketError::Reset);
        }
        let room = end.send_buffer.saturating_sub(end.outbox.count());
        let sent = end.outbox.pull(bytes, room.min(most));
        self.flow(id);
        Ok(sent)
    }

    /// A far end writes `count` bytes of `stream` from `start`; tells how many were taken, `None` after a reset.
    pub fn write(&mut self, id: EndId, stream: u32, start: u64, count: usize) -> Option<usize> {
        let mut bytes = Bytes::default();
        bytes.push(Run { stream, start, count });
        self.send(id, &mut bytes, count).ok()
    }

    /// Whether a read would not wait.
    pub(super) fn is_readable(&self, id: EndId) -> bool {
        let end = &self.ends[id];
        end.inbox.count() > 0 || end.fin_in || end.broken || end.peer.is_none()
    }

    /// Whether a send would take something, or fail.
    pub(super) fn is_writable(&self, id: EndId) -> bool {
        let end = &self.ends[id];
        end.broken || end.fin_sent || end.peer.is_none() || end.outbox.count() < end.send_buffer
    }

    /// Bytes in the inbox.
    pub(super) fn readable(&self, id: EndId) -> usize {
        self.ends[id].inbox.count()
    }

    /// Takes bytes out of the inbox.
    pub(super) fn take(&mut self, id: EndId, into: &mut Bytes, most: usize) -> usize {
        let taken = into.pull(&mut self.ends[id].inbox, most);
        if let Some(peer) = self.ends[id].peer {
            self.flow(peer);
        }
        taken
    }

    /// What stands after the last byte: an end, or an error that is told once.
    pub(super) fn ending(&mut self, id: EndId) -> Result<(), SocketError> {
        let end = &mut self.ends[id];
        if end.fin_in {
            return Ok(());
        }
        if std::mem::replace(&mut end.error_untold, false) {
            return Err(SocketError::Reset);
        }
        self.faults.note(Knob::ResetReadAsEof);
        Ok(())
    }

    /// A far end reads.
    pub fn read(&mut self, id: EndId, most: usize) -> FarRead {
        if self.ends[id].inbox.count() > 0 {
            let mut bytes = Bytes::default();
            self.take(id, &mut bytes, most);
            return FarRead::Bytes(bytes);
        }
        let end = &self.ends[id];
        match (end.fin_in, end.broken) {
            (true, _) => FarRead::Eof,
            (_, true) => FarRead::Reset,
            _ => FarRead::Empty,
        }
    }

    /// Sends the FIN, after what is queued.
    ///
    /// # Errors
    /// The connection was reset.
    pub fn shutdown(&mut self, id: EndId) -> Result<(), SocketError> {
        if self.ends[id].broken {
            return Err(SocketError::Reset);
        }
        self.ends[id].fin_sent = true;
        self.flow(id);
        Ok(())
    }

    /// Closes an end as close(2) does.
    pub fn close(&mut self, id: EndId) {
        let end = &mut self.ends[id];
        if std::mem::replace(&mut end.closed, true) || end.broken {
            return;
        }
        let over = end.fin_sent && end.fin_in && end.outbox.count() == 0;
        if !over && (end.reset_on_close || end.inbox.count() > 0) {
            return self.break_off(id);
        }
        end.fin_sent = true;
        self.flow(id);
        if let Some(peer) = self.ends[id].peer {
            self.flow(peer);
        }
    }

    /// Closes an end with a reset.
    pub fn reset(&mut self, id: EndId) {
        self.ends[id].reset_on_close = true;
        self.close(id);
    }

    fn close_listener(&mut self, index: usize) {
        self.listeners[index].open = false;
        while let Some(end) = self.listeners[index].queue.pop_front() {
            self.reset(end);
        }
    }

    /// The owner of `id` sends a reset.
    fn break_off(&mut self, id: EndId) {
        let end = &mut self.ends[id];
        end.broken = true;
        end.inbox.clear();
        if end.outbox.clear() > 0 {
            self.faults.note(Knob::ResetDiscarded);
        }
        if let Some(peer) = self.ends[id].peer {
            self.reset_arrives(peer);
        }
    }

    fn reset_arrives(&mut self, id: EndId) {
        let end = &mut self.ends[id];
        if !std::mem::replace(&mut end.broken, true) {
            end.error_untold = true;
            end.outbox.clear();
            self.stirred = true;
        }
    }

    /// Whether a poll tells of a hang-up: a reset, or a FIN in each direction.
    pub(super) fn is_hung_up(&self, id: EndId) -> bool {
        let end = &self.ends[id];
        end.broken || (end.fin_sent && end.fin_in)
    }

    pub(super) fn has_fin(&self, id: EndId) -> bool {
        self.ends[id].fin_in
    }

    pub(super) fn unacknowledged(&self, id: EndId) -> usize {
        self.ends[id].outbox.count()
    }

    /// Lets bytes flow from a sender's queue as far as the receiver's window has room.
    fn flow(&mut self, id: EndId) {
        let end = &self.ends[id];
        let Some(peer) = end.peer else { return };
        if end.broken || end.held {
            return;
        }
        if end.outbox.count() > 0 {
            if self.ends[peer].closed {
                // A kernel that gets bytes for what was closed answers with a reset.
                self.ends[peer].broken = true;
                self.reset_arrives(id);
                return;
            }
            let room = self.ends[peer].window.saturating_sub(self.ends[peer].inbox.count());
            if room > 0 && self.faults.strikes(Knob::SlowAcknowledge, &mut self.dice) {
                let until = self.now + Duration::from_micros(self.dice.range(1, 30_000));
                self.ends[id].held = true;
                self.held.push((until, id));
                return;
            }
            self.move_bytes(id, peer, room);
        }
        if self.ends[id].outbox.count() == 0 && self.ends[id].fin_sent {
            self.stirred |= !std::mem::replace(&mut self.ends[peer].fin_in, true);
        }
    }

    fn move_bytes(&mut self, id: EndId, peer: EndId, most: usize) {
        let mut outbox = std::mem::take(&mut self.ends[id].outbox);
        let moved = self.ends[peer].inbox.pull(&mut outbox, most);
        self.stirred |= moved > 0;
        self.ends[peer].arrived += moved as u64;
        self.ends[id].outbox = outbox;
    }

    /// Moves the clock without a ring: to `until`, or to when the next bytes flow. False: nothing will happen any more.
    pub fn pass_time(&mut self, until: Option<Instant>) -> bool {
        let Some(next) = self.next_flow().into_iter().chain(until).min() else { return false };
        self.now = self.now.max(next);
        self.flow_due();
        true
    }

    /// When bytes flow that are held back now.
    pub(super) fn next_flow(&self) -> Option<Instant> {
        self.held.iter().map(|(at, _)| *at).min()
    }

    /// Lets go of what was held back until now.
    pub(super) fn flow_due(&mut self) {
        let now = self.now;
        let due: Vec<EndId> = self.held.iter().filter(|(at, _)| *at <= now).map(|(_, id)| *id).collect();
        self.held.retain(|(at, _)| *at > now);
        for id in due {
            self.ends[id].held = false;
            self.flow(id);
        }
    }
}
