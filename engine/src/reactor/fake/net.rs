//! A network in memory: TCP as a relay can observe it (`tcp.rs`), listeners, the channels of openers and drivers
//! (`channels.rs`), and the far ends that a simulation drives.
//!
//! A descriptor is closed when its last holder drops it: the shard's socket, or a registration, which holds the file like
//! one of io_uring. A change that a kernel would report sets the edge of the file; the poller reports and clears it.

use std::cell::{RefCell, RefMut};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::SocketAddr;
use std::num::NonZeroU16;
use std::rc::Rc;
use std::time::Instant;

use super::channels::Message;
use super::faults::{Dice, Faults};
use super::tcp::End;
use crate::command::Family;
use crate::opener::PortRange;
use crate::reactor::Readiness;

/// The number of the host's own network namespace.
pub const HOST: u64 = u64::MAX;

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
    pub(super) newcomers: Vec<Newcomer>,
    /// When the simulation acts next.
    pub(super) act_at: Option<Instant>,
    /// No buffer is free before this time.
    pub(super) no_buffer_until: Option<Instant>,
    /// Connects in progress.
    pub(super) connecting: Vec<EndId>,
    /// Senders whose bytes are received late.
    pub(super) held: Vec<(Instant, EndId)>,
    /// Files whose state changed since the last report.
    pub(super) edges: BTreeSet<File>,
    descriptors: usize,
    pub(super) deadlocked: bool,
    /// Whether bytes or an end reached any end since the last turn.
    pub(super) changed: bool,
}

#[derive(Debug)]
pub(super) struct HostListener {
    port: u16,
    pub(super) family: Family,
    pub(super) queue: VecDeque<EndId>,
    open: bool,
    /// The number of accepts that fail from now on.
    pub(super) failing: u32,
}

/// A container's network namespace.
#[derive(Debug, Default)]
pub(super) struct Namespace {
    pub(super) servers: BTreeMap<SocketAddr, usize>,
    pub(super) gone: bool,
    pub(super) messages: Vec<Message>,
    /// The channel accepts no request before this time.
    pub(super) full_until: Option<Instant>,
    /// The ephemeral ports that the opener reports.
    pub(super) ephemeral: Option<PortRange>,
}

/// A connection that reached a server inside.
#[derive(Clone, Copy, Debug)]
pub struct Newcomer {
    /// The server's end.
    pub end: EndId,
    /// `SO_NETNS_COOKIE` of its namespace.
    pub namespace: u64,
    /// The server's address.
    pub address: SocketAddr,
}

/// A simulated open file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum File {
    End(EndId),
    Listener(usize),
    /// An opener channel into a namespace.
    Channel(u64),
    /// A channel to a driver that connects into a namespace.
    Driver(u64),
    /// A real descriptor that was adopted; calls on it are not simulated.
    Adopted,
}

/// A simulated descriptor.
#[derive(Debug)]
pub struct FakeSocket(pub(super) Rc<Descriptor>);

pub(super) struct Descriptor {
    net: FakeNet,
    pub(super) file: File,
}

impl std::fmt::Debug for Descriptor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.file.fmt(f)
    }
}

impl Drop for Descriptor {
    fn drop(&mut self) {
        let mut net = self.net.net();
        net.descriptors -= 1;
        match self.file {
            File::End(id) => net.close(id),
            File::Listener(index) => net.close_listener(index),
            File::Channel(_) | File::Driver(_) | File::Adopted => {}
        }
    }
}

/// The handle with which a simulation and a poller share a network.
#[derive(Clone, Debug)]
pub struct FakeNet(Rc<RefCell<Net>>);

impl FakeNet {
    /// Creates an empty network.
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
            no_buffer_until: None,
            connecting: Vec::new(),
            held: Vec::new(),
            edges: BTreeSet::new(),
            descriptors: 0,
            deadlocked: false,
            changed: false,
        })))
    }

    /// Borrows the network. The borrow must end before the shard is called and before a [`FakeSocket`] is dropped.
    pub fn net(&self) -> RefMut<'_, Net> {
        self.0.borrow_mut()
    }

    pub(super) fn descriptor(&self, file: File) -> FakeSocket {
        self.net().descriptors += 1;
        FakeSocket(Rc::new(Descriptor { net: self.clone(), file }))
    }

    /// Creates a listening socket on the host.
    pub fn listen(&self, port: u16, family: Family) -> FakeSocket {
        let mut net = self.net();
        let queue = VecDeque::new();
        net.listeners.push(HostListener { port, family, queue, open: true, failing: 0 });
        let index = net.listeners.len() - 1;
        drop(net);
        self.descriptor(File::Listener(index))
    }

    /// Creates an opener channel into a namespace. The first one also creates the namespace.
    pub fn channel(&self, namespace: u64) -> FakeSocket {
        self.net().make_namespace(namespace);
        self.descriptor(File::Channel(namespace))
    }

    /// Creates a channel to a driver that connects into a namespace. The first one also creates the namespace.
    pub fn driver(&self, namespace: u64) -> FakeSocket {
        self.net().make_namespace(namespace);
        self.descriptor(File::Driver(namespace))
    }
}

impl Net {
    /// Returns the virtual time.
    pub fn now(&self) -> Instant {
        self.now
    }

    /// Returns the number of waits of the poller.
    pub fn turns(&self) -> u64 {
        self.turns
    }

    /// Returns the number of open descriptors on the relay's side.
    pub fn descriptors(&self) -> usize {
        self.descriptors
    }

    /// Whether a wait found that no further event is possible.
    pub fn is_deadlocked(&self) -> bool {
        self.deadlocked
    }

    /// Returns the knobs.
    pub fn faults(&self) -> &Faults {
        &self.faults
    }

    /// Sets when the simulation acts next.
    pub fn act_at(&mut self, at: Option<Instant>) {
        self.act_at = at;
        self.deadlocked = false;
    }

    fn make_namespace(&mut self, namespace: u64) {
        let ephemeral = match self.dice.range(0, 2) {
            0 => None,
            1 => Some(PortRange { first: 2_000, last: 4_000 }),
            _ => Some(PortRange { first: 10_000, last: 20_000 }),
        };
        let fresh = Namespace { ephemeral, ..Namespace::default() };
        self.namespaces.entry(namespace).or_insert(fresh);
    }

    /// Starts a server inside; its connections have windows of `window` bytes.
    pub fn serve(&mut self, namespace: u64, address: SocketAddr, window: usize) {
        self.namespaces.entry(namespace).or_default().servers.insert(address, window);
    }

    /// Stops a server.
    pub fn stop_serving(&mut self, namespace: u64, address: SocketAddr) {
        self.namespaces.entry(namespace).or_default().servers.remove(&address);
    }

    /// Ends the opener or driver of a namespace.
    pub fn end_opener(&mut self, namespace: u64) {
        self.namespaces.entry(namespace).or_default().gone = true;
        self.edges.extend([File::Channel(namespace), File::Driver(namespace)]);
    }

    /// Connects a client to a host port; `None` if no socket listens.
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
        self.edges.insert(File::Listener(listener));
        Some(client)
    }

    /// Whether a socket listens on a host port.
    pub fn is_bound(&self, port: NonZeroU16) -> bool {
        self.listeners.iter().any(|listener| listener.open && listener.port == port.get())
    }

    /// Returns the connections that reached a server since the last call.
    pub fn newcomers(&mut self) -> Vec<Newcomer> {
        std::mem::take(&mut self.newcomers)
    }

    /// Whether a server listens on an address.
    pub(super) fn is_served(&self, namespace: u64, address: SocketAddr) -> bool {
        self.namespaces.get(&namespace).is_some_and(|namespace| namespace.servers.contains_key(&address))
    }

    fn close_listener(&mut self, index: usize) {
        self.listeners[index].open = false;
        while let Some(end) = self.listeners[index].queue.pop_front() {
            self.reset(end);
        }
    }

    /// Returns the result of a poll of a file.
    pub(super) fn poll(&self, file: File) -> Readiness {
        match file {
            File::End(id) => self.poll_end(id),
            File::Listener(index) if self.listeners[index].queue.is_empty() => Readiness::empty(),
            File::Listener(_) => Readiness::IN,
            File::Channel(namespace) | File::Driver(namespace) => self.poll_channel(namespace),
            File::Adopted => Readiness::empty(),
        }
    }

    /// Carries out the events that are due: delayed bytes, connects, messages.
    pub(super) fn run_due(&mut self) {
        self.flow_due();
        self.connects_due();
        self.messages_due();
        self.no_buffer_until = self.no_buffer_until.filter(|until| *until > self.now);
    }

    /// Returns the time of the next event.
    pub(super) fn next_due(&self) -> Option<Instant> {
        let flows = self.held.iter().map(|(at, _)| *at);
        let others = [self.next_connect(), self.next_message(), self.act_at, self.no_buffer_until];
        flows.chain(others.into_iter().flatten()).min()
    }

    /// Moves the clock without a poller: to `until`, or to the next flow of bytes. Returns false if no event will follow.
    pub fn pass_time(&mut self, until: Option<Instant>) -> bool {
        let flows = self.held.iter().map(|(at, _)| *at);
        let Some(next) = flows.chain(until).min() else { return false };
        self.now = self.now.max(next);
        self.flow_due();
        true
    }
}
