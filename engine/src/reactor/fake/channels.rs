//! Openers and drivers in memory: their answers to the requests that arrive on a channel.

use std::num::NonZeroU16;
use std::time::{Duration, Instant};

use super::FakeIo;
use super::faults::Knob;
use super::net::{EndId, FakeSocket, File, Net};
use crate::channel::ChannelError;
use crate::command::Family;
use crate::opener::{Answer, DialFailure, Failure, FailureKind, Request};
use crate::reactor::Readiness;

/// A message in flight to the relay.
#[derive(Debug)]
pub(super) struct Message {
    at: Instant,
    answer: Reply,
    /// Whether it has arrived and was reported.
    reported: bool,
}

#[derive(Debug)]
enum Reply {
    Now(Answer, Vec<EndId>),
    /// The result is decided when the driver connects.
    Dial {
        dial: u64,
        port: NonZeroU16,
        failure: Option<DialFailure>,
    },
}

impl FakeIo {
    /// Handles a request that arrives at an opener or driver.
    pub(super) fn request(&self, file: File, text: &[u8]) -> Result<(), ChannelError> {
        let (File::Channel(namespace) | File::Driver(namespace)) = file else {
            return Err(ChannelError::NotAChannel);
        };
        if self.net.net().is_gone(namespace) {
            return Err(ChannelError::Gone);
        }
        let now = self.net.net().now;
        if self.net.net().namespaces[&namespace].full_until.is_some_and(|until| until > now) {
            return Err(ChannelError::WouldBlock);
        }
        if self.strikes(Knob::ChannelFull) {
            let until = self.pause(Duration::from_millis(200));
            if let Some(there) = self.net.net().namespaces.get_mut(&namespace) {
                there.full_until = Some(until);
            }
            return Err(ChannelError::WouldBlock);
        }
        match serde_json::from_slice(text).map_err(ChannelError::Malformed)? {
            Request::Sockets { family, count, .. } => self.make(namespace, family, count),
            Request::Dial { dial, port } => self.dial(namespace, dial, port),
            other => panic!("a shard never sends {other:?}"),
        }
    }

    /// Answers a request for sockets, or refuses it.
    fn make(&self, namespace: u64, family: Family, count: u16) -> Result<(), ChannelError> {
        if self.strikes(Knob::StockGone) {
            self.net.net().end_opener(namespace);
            return Err(ChannelError::Gone);
        }
        let at = match self.strikes(Knob::StockSlow) {
            true => self.pause(Duration::from_millis(200)),
            false => self.net.net().now,
        };
        let failed =
            |kind| Answer::Failed { failure: Failure { kind, detail: "as the dice decided".into() } };
        let (answer, ends) = if self.strikes(Knob::StockExhausted) {
            (failed(FailureKind::Exhausted), Vec::new())
        } else if self.strikes(Knob::StockRefused) {
            (failed(FailureKind::Unsupported), Vec::new())
        } else {
            self.made(namespace, family, count)
        };
        self.net.net().reply(namespace, at, Reply::Now(answer, ends));
        Ok(())
    }

    fn made(&self, namespace: u64, family: Family, count: u16) -> (Answer, Vec<EndId>) {
        let fewer = count > 1 && self.strikes(Knob::StockFewer);
        let hostile = self.strikes(Knob::StockHostile);
        let mut net = self.net.net();
        let count = if fewer { net.dice.size(1, usize::from(count) - 1) } else { usize::from(count) };
        // A hostile opener sends sockets of another namespace, or one less than it claims.
        let (of, less) = match (hostile, net.dice.chance(500)) {
            (true, true) => (namespace + 1_000, 0),
            (true, false) => (namespace, 1),
            (false, _) => (namespace, 0),
        };
        let ends = (less..count)
            .map(|_| {
                let window = net.dice.size(1, 5000);
                net.end(Some(of), family, window)
            })
            .collect();
        let ephemeral = net.namespaces.get(&namespace).and_then(|there| there.ephemeral);
        (Answer::Made { count: u16::try_from(count).unwrap_or(u16::MAX), error: None, ephemeral }, ends)
    }

    /// Answers a request to dial.
    fn dial(&self, namespace: u64, dial: u64, port: NonZeroU16) -> Result<(), ChannelError> {
        if self.strikes(Knob::DialUnanswered) {
            return Ok(());
        }
        let at = match self.strikes(Knob::DialSlow) {
            true => self.pause(Duration::from_secs(4)),
            false => self.net.net().now,
        };
        let failures = [
            (Knob::DialRefused, DialFailure::Refused),
            (Knob::DialTimedOut, DialFailure::TimedOut),
            (Knob::DialExhausted, DialFailure::Exhausted),
        ];
        let failure = failures.into_iter().find(|(knob, _)| self.strikes(*knob)).map(|(_, why)| why);
        self.net.net().reply(namespace, at, Reply::Dial { dial, port, failure });
        Ok(())
    }

    /// Receives a message from a channel, for the relay.
    pub(super) fn message(&self, file: File) -> Result<(Vec<u8>, Vec<FakeSocket>), ChannelError> {
        let (File::Channel(namespace) | File::Driver(namespace)) = file else {
            return Err(ChannelError::NotAChannel);
        };
        if matches!(file, File::Driver(_)) && self.strikes(Knob::DriverGone) {
            self.net.net().end_opener(namespace);
        }
        if self.net.net().is_gone(namespace) {
            return Err(ChannelError::Gone);
        }
        let due = self.net.net().take_due_message(namespace, matches!(file, File::Driver(_)));
        let Some(reply) = due else { return Err(ChannelError::WouldBlock) };
        let (answer, ends) = match reply {
            Reply::Now(answer, ends) => (answer, ends),
            Reply::Dial { dial, failure: Some(why), .. } => (Answer::NotDialled { dial, why }, Vec::new()),
            Reply::Dial { .. } if self.strikes(Knob::DialLost) => return Err(ChannelError::DescriptorsLost),
            Reply::Dial { dial, port, .. } => match self.net.net().dial_inside(namespace, port) {
                Some(end) => (Answer::Dialled { dial }, vec![end]),
                None => (Answer::NotDialled { dial, why: DialFailure::Refused }, Vec::new()),
            },
        };
        let text = serde_json::to_vec(&answer).map_err(ChannelError::Unwritable)?;
        Ok((text, ends.into_iter().map(|end| self.net.descriptor(File::End(end))).collect()))
    }
}

impl Net {
    /// Whether the opener or the driver of a namespace has ended.
    fn is_gone(&self, namespace: u64) -> bool {
        self.namespaces.get(&namespace).is_none_or(|there| there.gone)
    }

    fn reply(&mut self, namespace: u64, at: Instant, answer: Reply) {
        let message = Message { at, answer, reported: false };
        self.namespaces.entry(namespace).or_default().messages.push(message);
    }

    pub(super) fn poll_channel(&self, namespace: u64) -> Readiness {
        let Some(there) = self.namespaces.get(&namespace) else { return Readiness::HUP };
        let mut ready = Readiness::empty();
        ready.set(Readiness::IN, there.gone || there.messages.iter().any(|message| message.at <= self.now));
        ready.set(Readiness::HUP | Readiness::RDHUP, there.gone);
        ready.set(Readiness::OUT, there.full_until.is_none());
        ready
    }

    /// Reports the messages that have arrived, and channels that have room again.
    pub(super) fn messages_due(&mut self) {
        let now = self.now;
        for (namespace, there) in &mut self.namespaces {
            let mut edge = false;
            for message in there.messages.iter_mut().filter(|message| message.at <= now) {
                edge |= !std::mem::replace(&mut message.reported, true);
            }
            if there.full_until.is_some_and(|until| until <= now) {
                there.full_until = None;
                edge = true;
            }
            if edge {
                self.edges.extend([File::Channel(*namespace), File::Driver(*namespace)]);
            }
        }
    }

    pub(super) fn next_message(&self) -> Option<Instant> {
        let of = |there: &super::net::Namespace| {
            let messages = there.messages.iter().filter(|message| !message.reported);
            messages.map(|message| message.at).chain(there.full_until).min()
        };
        self.namespaces.values().filter(|there| !there.gone).filter_map(of).min()
    }

    /// Takes a message that has arrived: the oldest of an opener, any of a driver.
    fn take_due_message(&mut self, namespace: u64, any: bool) -> Option<Reply> {
        let now = self.now;
        let messages = &mut self.namespaces.get_mut(&namespace)?.messages;
        let due: Vec<usize> =
            messages.iter().enumerate().filter(|(_, one)| one.at <= now).map(|(index, _)| index).collect();
        let last = if any { due.len().saturating_sub(1) } else { 0 };
        let chosen = *due.get(self.dice.size(0, last))?;
        Some(messages.remove(chosen).answer)
    }

    /// Returns the driver's end of a connection to the server on a port inside: 127.0.0.1 is tried first, then `::1`.
    fn dial_inside(&mut self, namespace: u64, port: NonZeroU16) -> Option<EndId> {
        let family =
            Family::ALL.into_iter().find(|family| self.is_served(namespace, family.loopback(port)))?;
        let window = self.dice.size(1, 5000);
        let end = self.end(Some(namespace), family, window);
        self.reach(end, namespace, family.loopback(port)).then_some(end)
    }
}
