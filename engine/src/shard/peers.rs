//! The other shards of an engine, as one that accepts sees them: their loads, and how to hand connections over.
//!
//! Loads are read without a lock and may be out of date by a turn; a connection that is handed to the second-best shard is
//! served as well. A handed-over connection is counted at once, so that a burst within one turn is spread, too.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::Sender;

use super::ShardCommand;
use crate::command::{Family, ForwardId};
use crate::reactor::Waker;

/// The shards of one engine, and which of them this one is.
#[derive(Debug)]
pub struct Peers {
    own: usize,
    shards: Vec<Peer>,
}

/// One shard.
#[derive(Clone, Debug)]
pub struct Peer {
    /// Its mailbox.
    pub commands: Sender<ShardCommand<OwnedFd>>,
    /// Ends its wait.
    pub waker: Waker,
    /// Its connections, as it published last, and those handed to it since.
    pub load: Arc<AtomicUsize>,
}

impl Peers {
    /// Creates the set of all shards, this one included, which has the index `own`.
    pub fn new(own: usize, shards: Vec<Peer>) -> Peers {
        Peers { own, shards }
    }

    /// Returns the shard with the fewest connections, if it has fewer than `load`.
    pub(super) fn emptier_than(&self, load: usize) -> Option<usize> {
        let others = self.shards.iter().enumerate().filter(|(index, _)| *index != self.own);
        let (index, least) = others
            .map(|(index, peer)| (index, peer.load.load(Ordering::Relaxed)))
            .min_by_key(|(_, load)| *load)?;
        (least < load).then_some(index)
    }

    /// Hands a connection over. A shard that has ended closes it.
    pub(super) fn send(&self, peer: usize, forward: ForwardId, socket: OwnedFd, came_by: Family) {
        if let Some(peer) = self.shards.get(peer) {
            peer.load.fetch_add(1, Ordering::Relaxed);
            if peer.commands.send(ShardCommand::Adopt { forward, socket, came_by }).is_ok() {
                peer.waker.wake();
            }
        }
    }

    /// Publishes how many connections this shard has.
    pub(super) fn publish_load(&self, connections: usize) {
        if let Some(own) = self.shards.get(self.own) {
            own.load.store(connections, Ordering::Relaxed);
        }
    }
}
