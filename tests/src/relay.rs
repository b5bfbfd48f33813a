//! An engine in this process, driven as control drives it, relaying into a namespace.

use std::collections::{HashMap, VecDeque};
use std::net::SocketAddr;
use std::num::NonZeroU16;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use landfall_engine::RingChoice;
use landfall_engine::command::{
    Command, Ending, Event, EventMessage, Family, ForwardId, ForwardState, ForwardStats, ListenFailure,
    Reach, UpstreamId, UpstreamKind, WatchSources,
};
use landfall_engine::engine::{Engine, EngineOptions};
use landfall_engine::limits::Limits;

use crate::{Namespace, TIMEOUT, UpstreamGuard, enter, upstream_kind};

/// An engine, and the events that no call of [`Driver::expect`] has returned yet.
#[derive(Debug)]
pub struct Driver {
    engine: Engine,
    shards: u16,
    waiting: VecDeque<Event>,
    behind: HashMap<UpstreamId, UpstreamGuard>,
}

impl Driver {
    /// Starts an engine and checks that it runs on the requested ring.
    ///
    /// # Panics
    /// If it does not.
    pub fn start(limits: Limits, ring: RingChoice) -> Driver {
        let engine = Engine::start(EngineOptions { limits, ring, ..EngineOptions::default() }).unwrap();
        let mut driver = Driver { engine, shards: 0, waiting: VecDeque::new(), behind: HashMap::new() };
        driver.shards = driver.expect("the engine to be ready", |event| match event {
            Event::Ready { shards, .. } => Some(*shards),
            _ => None,
        });
        driver
    }

    /// Returns the engine's ready event.
    pub fn ready(&self) -> &Event {
        self.engine.ready()
    }

    /// Sends a command.
    pub fn apply(&self, command: Command) {
        self.engine.apply(command, Vec::new());
    }

    /// Sends a command with its descriptors.
    pub fn apply_with(&self, command: Command, descriptors: Vec<OwnedFd>) {
        self.engine.apply(command, descriptors);
    }

    /// Waits for the first event that `choose` accepts; earlier events are kept.
    ///
    /// # Panics
    /// If it does not arrive; the message lists the events that arrived.
    #[track_caller]
    pub fn expect<T>(&mut self, what: &str, mut choose: impl FnMut(&Event) -> Option<T>) -> T {
        let deadline = Instant::now() + TIMEOUT;
        for index in 0..self.waiting.len() {
            if let Some(found) = choose(&self.waiting[index]) {
                self.waiting.remove(index);
                return found;
            }
        }
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let Ok(EventMessage { event, .. }) = self.engine.events().recv_timeout(left) else {
                panic!("waited {TIMEOUT:?} for {what}; other events: {:?}", self.waiting);
            };
            match choose(&event) {
                Some(found) => return found,
                None => self.waiting.push_back(event),
            }
        }
    }

    /// Returns every event so far that was not expected, without waiting.
    pub fn pending(&mut self) -> Vec<Event> {
        self.waiting.extend(self.engine.events().try_iter().map(|reported| reported.event));
        self.waiting.drain(..).collect()
    }

    /// Adds a namespace as an upstream, with `cookie` instead of its own cookie if one is given.
    ///
    /// # Panics
    /// If no opener can enter it.
    #[track_caller]
    pub fn add_upstream(&mut self, upstream: UpstreamId, namespace: &Namespace, cookie: Option<u64>) {
        let (own_cookie, sources, descriptors, behind) = enter(namespace, self.shards);
        let netns_cookie = cookie.unwrap_or(own_cookie);
        self.behind.insert(upstream, behind);
        self.add_entered(upstream, upstream_kind(), (netns_cookie, sources, descriptors));
    }

    /// Adds an upstream with this cookie, these watch sources, and their descriptors.
    ///
    /// # Panics
    /// If the engine refuses it.
    #[track_caller]
    pub fn add_entered(
        &mut self,
        upstream: UpstreamId,
        kind: UpstreamKind,
        (netns_cookie, sources, descriptors): (u64, WatchSources, Vec<OwnedFd>),
    ) {
        self.engine.apply(Command::AddUpstream { upstream, netns_cookie, sources, kind }, descriptors);
        self.expect("the upstream", |event| match event {
            Event::UpstreamAdded { upstream: added } if *added == upstream => Some(()),
            Event::Refused { reason } => panic!("refused: {reason}"),
            _ => None,
        });
    }

    /// Requests a listener and waits for the result.
    ///
    /// # Panics
    /// If no result arrives.
    #[track_caller]
    pub fn open(
        &mut self,
        forward: ForwardId,
        upstream: UpstreamId,
        ports: (u16, u16),
        reach: Reach,
    ) -> Result<(), ListenFailure> {
        let (host_port, target_port) = (port(ports.0), port(ports.1));
        self.apply(Command::OpenListener { forward, upstream, host_port, target_port, reach });
        self.expect("the listener", |event| match event {
            Event::ListenerOpened { forward: opened, .. } if *opened == forward => Some(Ok(())),
            Event::ListenerFailed { forward: failed, failure, .. } if *failed == forward => {
                Some(Err(failure.clone()))
            }
            Event::Refused { reason } => panic!("refused: {reason}"),
            _ => None,
        })
    }

    /// Closes a listener and waits until its port is free.
    ///
    /// # Panics
    /// If the engine does not report it.
    #[track_caller]
    pub fn close(&mut self, forward: ForwardId, ending: Ending) -> ForwardStats {
        self.apply(Command::CloseListener { forward, ending });
        self.expect("the listener to close", |event| match event {
            Event::ListenerClosed { forward: closed, stats } if *closed == forward => Some(*stats),
            _ => None,
        })
    }

    /// Removes an upstream and waits until that is complete.
    ///
    /// # Panics
    /// If the engine does not report it.
    #[track_caller]
    pub fn remove_upstream(&mut self, upstream: UpstreamId, ending: Ending) {
        self.apply(Command::RemoveUpstream { upstream, ending });
        self.expect("the upstream to be removed", |event| match event {
            Event::UpstreamRemoved { upstream: removed, .. } if *removed == upstream => Some(()),
            _ => None,
        });
        self.behind.remove(&upstream);
    }

    /// Returns every forward that the engine holds.
    ///
    /// # Panics
    /// If the engine does not answer.
    #[track_caller]
    pub fn describe(&mut self) -> Vec<ForwardState> {
        self.apply(Command::Describe);
        let mut all = Vec::new();
        loop {
            let (part, more) = self.expect("the state", |event| match event {
                Event::State { forwards, more, .. } => Some((forwards.clone(), *more)),
                _ => None,
            });
            all.extend(part);
            if !more {
                return all;
            }
        }
    }
}

/// A host port that leads inside.
#[derive(Clone, Copy, Debug)]
pub struct Forward {
    /// Its number.
    pub id: ForwardId,
    /// The port on the host.
    pub host_port: u16,
}

impl Forward {
    /// Returns its address on the host, by family.
    pub fn at(self, family: Family) -> SocketAddr {
        family.loopback(port(self.host_port))
    }

    /// Returns 127.0.0.1 with its port.
    pub fn v4(self) -> SocketAddr {
        self.at(Family::V4)
    }
}

/// An engine, one namespace, and forwards into it. Dropping it stops the engine.
#[derive(Debug)]
pub struct Relay {
    /// The engine.
    pub driver: Driver,
    /// The container's side.
    pub inside: Namespace,
    forwards: u32,
}

impl Relay {
    /// The id of the only upstream.
    pub const UPSTREAM: UpstreamId = UpstreamId(1);

    /// Starts an engine with the default limits.
    pub fn start(ring: RingChoice) -> Relay {
        Relay::start_with(Limits::default(), ring)
    }

    /// Starts an engine with other limits.
    ///
    /// # Panics
    /// If the engine does not start, or cannot enter the namespace.
    pub fn start_with(limits: Limits, ring: RingChoice) -> Relay {
        let inside = Namespace::new();
        let mut driver = Driver::start(limits, ring);
        driver.add_upstream(Relay::UPSTREAM, &inside, None);
        Relay::of(driver, inside)
    }

    /// Wraps an engine that already has `inside` as its upstream.
    pub fn of(driver: Driver, inside: Namespace) -> Relay {
        Relay { driver, inside, forwards: 0 }
    }

    /// Opens the same port on the host, for a server whose address families are not known.
    ///
    /// # Panics
    /// If the port cannot be bound.
    #[track_caller]
    pub fn forward(&mut self, port: u16) -> Forward {
        self.forward_reach(port, Reach::UNKNOWN)
    }

    /// Opens the same port on the host, for a server that listens on the families of `reach`.
    ///
    /// # Panics
    /// If the port cannot be bound.
    #[track_caller]
    pub fn forward_reach(&mut self, port: u16, reach: Reach) -> Forward {
        self.forwards += 1;
        let id = ForwardId(self.forwards);
        self.driver.open(id, Relay::UPSTREAM, (port, port), reach).unwrap();
        Forward { id, host_port: port }
    }

    /// Returns the current counters of a forward.
    ///
    /// # Panics
    /// If the forward does not exist.
    #[track_caller]
    pub fn stats(&mut self, forward: Forward) -> ForwardStats {
        let state = self.driver.describe();
        state.iter().find(|state| state.forward == forward.id).expect("a forward that is held").stats
    }

    /// Waits until `wanted` accepts the counters of a forward.
    ///
    /// # Panics
    /// If it never accepts them; the message shows the counters.
    #[track_caller]
    pub fn stats_become(
        &mut self,
        forward: Forward,
        what: &str,
        wanted: impl Fn(&ForwardStats) -> bool,
    ) -> ForwardStats {
        let deadline = Instant::now() + TIMEOUT;
        loop {
            let stats = self.stats(forward);
            if wanted(&stats) {
                return stats;
            }
            assert!(Instant::now() < deadline, "waited {TIMEOUT:?} for {what}; last seen: {stats:?}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

fn port(number: u16) -> NonZeroU16 {
    NonZeroU16::new(number).expect("a port")
}
