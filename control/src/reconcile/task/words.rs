//! What the visits of containers tell, taken in.

use std::time::Instant;

use super::containers::Container;
use super::driver::{Driver, ENTER_AGAIN};
use crate::events::Event as JournalEvent;
use crate::reconcile::fleet::Admission;
use crate::reconcile::reach::{Certainty, Entrance, Told, Word};
use crate::reconcile::table::Reached;
use crate::registration::model::ContainerName;

impl Driver {
    /// Where a visit is that told this, unless it was replaced meanwhile.
    pub(super) fn place_of(&self, told: &Told) -> Option<usize> {
        self.containers.iter().position(|container| {
            *container.name() == told.name
                && container.visit.as_ref().is_some_and(|visit| visit.number == told.visit)
        })
    }

    pub(super) async fn hear_word(&mut self, told: Told) {
        let Some(at) = self.place_of(&told) else { return };
        let Some(container) = self.containers.get_mut(at) else { return };
        match told.word {
            Word::Entered { serial, entrance } => {
                let visit = container.visit.as_ref();
                if visit.is_some_and(|visit| visit.gate.borrow().is_some_and(|gate| gate.serial == serial)) {
                    self.admit(at, entrance).await;
                }
            }
            Word::Missed { certainty, reason } => {
                container.tried |= certainty != Certainty::Unknown;
                container.missed = true;
                let (state, told) = match certainty {
                    Certainty::Gone => (Reached::Waiting, false),
                    Certainty::Refused | Certainty::Unknown => (Reached::Unreachable, true),
                };
                if certainty == Certainty::Gone {
                    self.fleet.left(&told_name(container));
                }
                self.mark(at, state, Some(reason), told);
            }
            Word::Left { reason } => {
                container.tried = true;
                container.again = None;
                self.fleet.left(&told_name(container));
                self.mark(at, Reached::Waiting, Some(reason), true);
            }
            Word::Ended => {
                container.tried = true;
                container.again = None;
                let name = told_name(container);
                self.fleet.left(&name);
                self.mark(at, Reached::Waiting, Some("its process has ended".to_owned()), false);
                // Nobody may listen; the container is then looked at by whoever looks at all of them.
                let _ = self.parts.ended.send(name);
            }
        }
    }

    async fn admit(&mut self, at: usize, entrance: Entrance) {
        let Some(container) = self.containers.get_mut(at) else { return };
        container.tried = true;
        let name = told_name(container);
        let admission = self.fleet.reached(&name, entrance.cookie);
        container.missed = matches!(admission, Admission::Shared(_));
        match admission {
            Admission::Known(_) => self.mark(at, Reached::Reached, None, true),
            Admission::Add(upstream) => {
                // What the one before held has to be let go of first.
                self.step_once().await;
                if self.give(&entrance.command(upstream), &entrance.descriptors).await {
                    self.mark(at, Reached::Reached, None, true);
                }
            }
            Admission::Shared(other) => {
                container.again = Some(Instant::now() + ENTER_AGAIN);
                let reason =
                    format!("it shares the network of container \"{other}\", which is forwarded already");
                self.mark(at, Reached::Unreachable, Some(reason), true);
            }
            Admission::Unwanted => {}
        }
    }

    /// Notes how far a container is reached, and tells when that is news.
    pub(super) fn mark(&mut self, at: usize, state: Reached, reason: Option<String>, tell: bool) {
        let Some(container) = self.containers.get_mut(at) else { return };
        let news = container.state != state || container.reason != reason;
        container.state = state;
        container.reason = reason.clone();
        if !news || !tell {
            return;
        }
        let container_name = container.name().as_str().to_owned();
        let way = container.way.as_ref().map(ToString::to_string).unwrap_or_default();
        self.journal.tell(&match state {
            Reached::Reached => JournalEvent::ContainerReached { container_name, way },
            _ => JournalEvent::ContainerUnreachable { container_name, reason: reason.unwrap_or_default() },
        });
    }
}

fn told_name(container: &Container) -> ContainerName {
    container.registration.container_name.clone()
}
