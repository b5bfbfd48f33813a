//! The processes behind the sockets that containers listen on.
//!
//! A process is found by reading `/proc/PID/fd` of all processes, which costs as much as there is on the host, and a container
//! decides how often its sockets are new ones. So sockets are looked up together, off the task's thread, and between two
//! look-ups there is a pause of [`REST_FACTOR`] times as long as the last one took.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use tokio::task::JoinHandle;

use crate::sys::launcher::owners_of_sockets;
use crate::sys::processes::ProcessFact;

/// A look-up may take one part in so many of a core.
const REST_FACTOR: u32 = 10;

/// The owners of the sockets that are listed, by inode.
#[derive(Debug)]
pub(super) struct SocketOwners {
    sockets: BTreeMap<u64, Lookup>,
    looking: Option<JoinHandle<Found>>,
    /// When the next look-up may start.
    not_before: Instant,
}

#[derive(Debug)]
enum Lookup {
    /// It is to be looked up.
    Wanted,
    /// It is being looked up.
    Asked,
    /// It was; none where no process was found.
    Done(Option<ProcessFact>),
}

/// The result of a look-up, and how long it took.
#[derive(Debug)]
pub(super) struct Found(BTreeMap<u64, ProcessFact>, Duration);

impl SocketOwners {
    pub(super) fn new() -> SocketOwners {
        SocketOwners { sockets: BTreeMap::new(), looking: None, not_before: Instant::now() }
    }

    /// A container has these sockets now instead of those before. A socket belongs to one container.
    pub(super) fn replace(&mut self, before: &BTreeSet<u64>, now: &BTreeSet<u64>) {
        for inode in before.difference(now) {
            self.sockets.remove(inode);
        }
        for inode in now.difference(before) {
            self.sockets.insert(*inode, Lookup::Wanted);
        }
    }

    /// The process of a socket, as far as it is known.
    pub(super) fn of(&self, inode: u64) -> Option<&ProcessFact> {
        match self.sockets.get(&inode) {
            Some(Lookup::Done(owner)) => owner.as_ref(),
            _ => None,
        }
    }

    fn is_wanted(&self) -> bool {
        self.sockets.values().any(|lookup| matches!(lookup, Lookup::Wanted))
    }

    /// When a look-up is to start.
    pub(super) fn due(&self) -> Option<Instant> {
        (self.looking.is_none() && self.is_wanted()).then_some(self.not_before)
    }

    /// Starts a look-up, where one is due.
    pub(super) fn look(&mut self) {
        if self.due().is_none_or(|due| due > Instant::now()) {
            return;
        }
        let mut inodes = Vec::new();
        for (inode, lookup) in &mut self.sockets {
            if matches!(lookup, Lookup::Wanted) {
                *lookup = Lookup::Asked;
                inodes.push(*inode);
            }
        }
        self.looking = Some(tokio::task::spawn_blocking(move || {
            let began = Instant::now();
            let found = owners_of_sockets(&inodes);
            Found(found, began.elapsed())
        }));
    }

    /// Waits for the result of the look-up that runs.
    pub(super) async fn found(&mut self) -> Found {
        match &mut self.looking {
            // A look-up that panicked has found nothing, which was reported where that happened.
            Some(looking) => looking.await.unwrap_or_else(|_| Found(BTreeMap::new(), Duration::ZERO)),
            None => std::future::pending().await,
        }
    }

    /// Takes in the result of a look-up. Returns the sockets that were looked up and are still listed.
    pub(super) fn take(&mut self, Found(mut found, took): Found) -> BTreeSet<u64> {
        self.looking = None;
        self.not_before = Instant::now() + REST_FACTOR * took;
        let asked = self.sockets.iter_mut().filter(|(_, lookup)| matches!(lookup, Lookup::Asked));
        let done = asked.map(|(inode, lookup)| {
            *lookup = Lookup::Done(found.remove(inode));
            *inode
        });
        done.collect()
    }
}
