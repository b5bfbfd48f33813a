//! Drivers that dial when they are asked to: slow ones, late ones, and those that have gone.

use std::num::NonZeroU16;
use std::time::{Duration, Instant};

use super::faults::Knob;
use super::net::{EndId, FakeSocket, Net, What};
use super::{Dialled, FakeRing};
use crate::command::Family;
use crate::opener::DialFailure;
use crate::opener::client::StockError;

/// A dial that a driver was asked for.
#[derive(Clone, Copy, Debug)]
pub(super) struct AskedDial {
    pub(super) at: Instant,
    pub(super) dial: u64,
    pub(super) port: NonZeroU16,
    /// Why it comes to nothing, where that was decided.
    pub(super) failure: Option<DialFailure>,
}

impl FakeRing {
    pub(super) fn ask(&self, channel: &FakeSocket, dial: u64, port: NonZeroU16) -> Result<(), StockError> {
        let What::Driver(namespace) = channel.0.what else { return Err(StockError::Gone) };
        if self.net.net().is_gone(namespace) {
            return Err(StockError::Gone);
        }
        if self.strikes(Knob::DialUnanswered) {
            return Ok(());
        }
        let now = self.net.net().now;
        let at = if self.strikes(Knob::DialSlow) { self.pause(Duration::from_secs(4)) } else { now };
        let failures = [
            (Knob::DialRefused, DialFailure::Refused),
            (Knob::DialTimedOut, DialFailure::TimedOut),
            (Knob::DialExhausted, DialFailure::Exhausted),
        ];
        let failure = failures.into_iter().find(|(knob, _)| self.strikes(*knob)).map(|(_, why)| why);
        self.net.net().asked(namespace, AskedDial { at, dial, port, failure });
        Ok(())
    }

    pub(super) fn hear(&self, channel: &FakeSocket) -> Result<Dialled<FakeSocket>, StockError> {
        let What::Driver(namespace) = channel.0.what else { return Err(StockError::Gone) };
        if self.strikes(Knob::DriverGone) {
            self.net.net().end_opener(namespace);
        }
        if self.net.net().is_gone(namespace) {
            return Err(StockError::Gone);
        }
        let due = self.net.net().take_due_dial(namespace);
        let Some(AskedDial { dial, port, failure, .. }) = due else { return Err(StockError::Gone) };
        let result = match failure {
            Some(why) => Err(why),
            None if self.strikes(Knob::DialLost) => {
                return Err(StockError::Exhausted("too many open files".into()));
            }
            None => {
                let end = self.net.net().dial_inside(namespace, port);
                end.map(|end| self.net.descriptor(What::End(end))).ok_or(DialFailure::Refused)
            }
        };
        Ok(Dialled { dial, result })
    }
}

impl Net {
    /// Whether the opener or the driver of a namespace has ended.
    pub(super) fn is_gone(&self, namespace: u64) -> bool {
        self.namespaces.get(&namespace).is_none_or(|there| there.gone)
    }

    /// A driver has got the request to dial.
    pub(super) fn asked(&mut self, namespace: u64, dial: AskedDial) {
        self.namespaces.entry(namespace).or_default().dials.push(dial);
    }

    /// When a driver answers next.
    pub(super) fn next_answer(&self, namespace: u64) -> Option<Instant> {
        self.namespaces.get(&namespace)?.dials.iter().map(|dial| dial.at).min()
    }

    /// One of the dials whose answer is due, whichever.
    pub(super) fn take_due_dial(&mut self, namespace: u64) -> Option<AskedDial> {
        let now = self.now;
        let dials = &mut self.namespaces.get_mut(&namespace)?.dials;
        let due: Vec<usize> =
            dials.iter().enumerate().filter(|(_, dial)| dial.at <= now).map(|(index, _)| index).collect();
        let chosen = due.get(self.dice.size(0, due.len().saturating_sub(1)))?;
        Some(dials.swap_remove(*chosen))
    }

    /// The driver's end of a way to the server on a port inside: 127.0.0.1 is tried first, then `::1`.
    pub(super) fn dial_inside(&mut self, namespace: u64, port: NonZeroU16) -> Option<EndId> {
        let family =
            Family::ALL.into_iter().find(|family| self.is_served(namespace, family.loopback(port)))?;
        let window = self.dice.size(1, 5000);
        let end = self.end(Some(namespace), family, window);
        self.reach(end, namespace, family.loopback(port)).then_some(end)
    }
}
