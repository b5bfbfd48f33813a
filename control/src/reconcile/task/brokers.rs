//! Brokers: what their sessions announce comes in, and what became of it goes back.
//!
//! There is one link for a name. Another one takes its place, and the one before it counts as stopped.

use std::collections::BTreeMap;

use tokio::sync::mpsc;
use tokio_util::task::AbortOnDropHandle;

use super::driver::Driver;
use crate::broker::message::ForwardResult;
use crate::reconcile::announced::{Announcement, BrokerLink, BrokerWord};
use crate::reconcile::table::RowState;
use crate::registration::model::ContainerName;

/// What a session said, or that it has gone.
#[derive(Debug)]
pub(super) struct Heard {
    name: ContainerName,
    /// Of which link: one that was replaced may have left a word behind.
    link: u64,
    /// None when the broker has dropped its end.
    said: Option<Announcement>,
}

/// Forwarding's end of a link.
#[derive(Debug)]
struct End {
    number: u64,
    words: mpsc::UnboundedSender<BrokerWord>,
    _listening: AbortOnDropHandle<()>,
}

/// All links.
#[derive(Debug)]
pub(super) struct Brokers {
    ends: BTreeMap<ContainerName, End>,
    next: u64,
    announced: mpsc::UnboundedSender<Heard>,
    heard: mpsc::UnboundedReceiver<Heard>,
}

/// Both ends of a new link.
pub(super) fn link() -> (BrokerLink, mpsc::UnboundedReceiver<Announcement>, mpsc::UnboundedSender<BrokerWord>)
{
    let (announce, announcements) = mpsc::unbounded_channel();
    let (words, receiver) = mpsc::unbounded_channel();
    (BrokerLink { announce, words: receiver }, announcements, words)
}

impl Brokers {
    pub(super) fn new() -> Brokers {
        let (announced, heard) = mpsc::unbounded_channel();
        Brokers { ends: BTreeMap::new(), next: 1, announced, heard }
    }

    /// Waits for what a session says next.
    pub(super) async fn hear(&mut self) -> Heard {
        match self.heard.recv().await {
            Some(heard) => heard,
            // It cannot end while this value holds one of its senders.
            None => std::future::pending().await,
        }
    }

    /// Whether a broker of this name had a link before.
    fn add(
        &mut self,
        name: ContainerName,
        mut announcements: mpsc::UnboundedReceiver<Announcement>,
        words: mpsc::UnboundedSender<BrokerWord>,
    ) -> bool {
        let number = self.next;
        self.next += 1;
        let (announced, own) = (self.announced.clone(), name.clone());
        let listening = tokio::spawn(async move {
            loop {
                let said = announcements.recv().await;
                let gone = said.is_none();
                // Nobody hears it any more where forwarding has ended.
                if announced.send(Heard { name: own.clone(), link: number, said }).is_err() || gone {
                    return;
                }
            }
        });
        let end = End { number, words, _listening: AbortOnDropHandle::new(listening) };
        self.ends.insert(name, end).is_some()
    }

    /// Tells a session; one that has gone is told nothing.
    fn tell(&self, name: &ContainerName, word: BrokerWord) {
        if let Some(end) = self.ends.get(name) {
            let _ = end.words.send(word);
        }
    }
}

impl Driver {
    /// A broker begins.
    pub(super) fn meet_broker(
        &mut self,
        name: ContainerName,
        announcements: mpsc::UnboundedReceiver<Announcement>,
        words: mpsc::UnboundedSender<BrokerWord>,
    ) {
        self.brokers.add(name, announcements, words);
    }

    /// Takes in what a session said.
    pub(super) async fn hear_broker(&mut self, heard: Heard) {
        let Heard { name, link, said } = heard;
        if self.brokers.ends.get(&name).is_none_or(|end| end.number != link) {
            // Whoever waits for the end of a link that was replaced finds its answer dropped.
            return;
        }
        match said {
            None => drop(self.brokers.ends.remove(&name)),
            Some(Announcement::Stop(done)) => {
                self.brokers.ends.remove(&name);
                self.step_once().await;
                // Whoever asked may have gone.
                let _ = done.send(());
            }
            Some(Announcement::Listening { opened, .. }) => {
                let rows = self.fleet.rows(&name);
                for told in opened {
                    let row = rows.iter().find(|row| row.port == told.port);
                    let result = match row.map(|row| (row.state, row.reason.clone())) {
                        Some((RowState::Open, _)) => Ok(told.port),
                        Some((RowState::Denied, _)) => Err("policy excluded".to_owned()),
                        Some((_, Some(reason))) => Err(reason),
                        Some((_, None)) | None => Err("it is not forwarded".to_owned()),
                    };
                    let result = ForwardResult { port: told.port, result };
                    self.brokers.tell(&name, BrokerWord::Result(result));
                }
            }
            Some(Announcement::Reserve { target, .. }) => {
                let result = Err("it is not forwarded".to_owned());
                let result = ForwardResult { port: target, result };
                self.brokers.tell(&name, BrokerWord::Result(result));
            }
            Some(Announcement::Up | Announcement::Down) => {}
        }
    }
}
