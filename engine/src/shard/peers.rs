//! The other shards of an engine, from the view of a shard that accepts: their loads, and the transfer of connections to
//! them.
//!
//! Loads are read without a lock and may be one turn old; a connection that goes to the second-best shard is served equally
//! well. A transferred connection is counted at once, so that a burst within one turn is distributed, too.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::Sender;

use super::ShardCommand;
use crate::command::{Family, ForwardId};
use crate::reactor::Waker;

/// The shards of one engine, and the index of this one.
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
    /// Ends the wait of its reactor.
    pub waker: Waker,
    /// The number of its connections, as it last published, plus those passed to it since.
    pub load: Arc<AtomicUsize>,
}

impl Peers {
    /// Creates the set of all shards, including this one, which has the index `own`.
    pub fn new(own: usize, shards: Vec<Peer>) -> Peers {
        Peers { own, shards }
    }

    /// Returns the shard with the fewest connections, if it has fewer than `load`.
    pub(super) fn less_loaded_than(&self, load: usize) -> Option<usize> {
        let others = self.shards.iter().enumerate().filter(|(index, _)| *index != self.own);
        let (index, least) = others
            .map(|(index, peer)| (index, peer.load.load(Ordering::Relaxed)))
            .min_by_key(|(_, load)| *load)?;
        (least < load).then_some(index)
    }

    /// Passes a connection to a peer. A shard that has ended closes it.
    pub(super) fn send(&self, peer: usize, forward: ForwardId, socket: OwnedFd, client_family: Family) {
        if let Some(peer) = self.shards.get(peer) {
            peer.load.fetch_add(1, Ordering::Relaxed);
            if peer.commands.send(ShardCommand::Adopt { forward, socket, client_family }).is_ok() {
                peer.waker.wake();
            }
        }
    }

    /// Publishes the number of connections of this shard.
    pub(super) fn publish_load(&self, connections: usize) {
        if let Some(own) = self.shards.get(self.own) {
            own.load.store(connections, Ordering::Relaxed);
        }
    }
}
