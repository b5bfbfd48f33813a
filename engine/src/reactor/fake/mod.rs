//! A poller in memory: seeded, with its own clock, and with every fault that a kernel may show to a reactor.
//!
//! A simulation owns the [`FakeNet`], drives the far ends (clients on the host, servers inside), and turns the shard. When
//! no event is possible at once, [`Poller::wait`] moves the clock to the next event. The [`Dice`] make the choices of a
//! kernel: when a notice arrives, in which order, how many times, and whether its registration continues.
//!
//! An edge is reported once, unless a knob changes that. A reactor that loses one makes no progress, which the simulation
//! detects. A registration holds its file like a registration of io_uring, so a socket that is closed without removing its
//! registration stays open, which the simulation detects, too.

mod bytes;
mod channels;
mod faults;
mod io;
mod net;
mod tcp;

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::rc::Rc;
use std::time::Instant;

use rustix::io::Errno;

use self::net::Descriptor;
use super::{Key, Notice, Poller, Reactor, ReactorError, Readiness, Waker};
use crate::limits::Limits;

pub use self::bytes::{Bytes, FakeBuffer, Run};
pub use self::faults::{Dice, Faults, Knob};
pub use self::io::FakeIo;
pub use self::net::{EndId, FakeNet, FakeSocket, HOST, Net, Newcomer};
pub use self::tcp::FarRead;

/// The number of ended registrations that are kept for late reports.
const ENDED_MAX: usize = 16;

/// The simulated poller.
pub struct FakePoller {
    net: FakeNet,
    reports_urgent: bool,
    registrations: BTreeMap<Key, Registration>,
    ended: VecDeque<Key>,
}

struct Registration {
    file: Rc<Descriptor>,
    /// The turn before which it is not reported.
    not_before: u64,
    /// Whether its delay was decided.
    delayed: bool,
    state: Registered,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Registered {
    Armed,
    /// It failed, and a notice will report that.
    Failing,
    /// It was removed, and a notice will report that.
    Removed,
}

impl FakePoller {
    /// Creates a poller over `net`.
    pub fn new(net: FakeNet) -> FakePoller {
        let reports_urgent = net.net().dice.chance(500);
        FakePoller { net, reports_urgent, registrations: BTreeMap::new(), ended: VecDeque::new() }
    }

    /// Creates a reactor over `net`, with the pool bounds of `limits`.
    pub fn reactor(net: &FakeNet, limits: &Limits) -> Reactor<FakePoller> {
        Reactor::new(FakePoller::new(net.clone()), FakeIo::new(net.clone(), limits), limits)
    }

    fn strikes(&self, knob: Knob) -> bool {
        let net = &mut *self.net.net();
        net.faults.strikes(knob, &mut net.dice)
    }

    fn roll(&self, low: u64, high: u64) -> u64 {
        self.net.net().dice.range(low, high)
    }

    /// Reports changes of readiness. Returns true if a report was postponed.
    fn collect(&mut self, notices: &mut Vec<Notice>) -> bool {
        let keys: Vec<Key> = self.registrations.keys().copied().collect();
        let turn = self.net.net().turns;
        let mut put_off = false;
        for key in keys {
            let Some(registration) = self.registrations.get(&key) else { continue };
            let edge = self.net.net().edges.contains(&registration.file.file);
            if registration.state == Registered::Armed && !edge {
                continue;
            }
            if registration.not_before > turn {
                put_off = true;
                continue;
            }
            let late = match registration.state {
                Registered::Removed => Knob::RemovedLate,
                Registered::Armed | Registered::Failing => Knob::Delayed,
            };
            if !registration.delayed && self.strikes(late) {
                let turns = self.roll(1, 5);
                if let Some(registration) = self.registrations.get_mut(&key) {
                    registration.not_before = turn + turns;
                    registration.delayed = true;
                }
                put_off = true;
                continue;
            }
            self.report(key, notices);
        }
        if notices.is_empty() {
            self.report_any(notices);
        }
        self.report_ended(notices);
        if notices.len() > 1 && self.strikes(Knob::Reordered) {
            // Notices of one registration stay in order.
            let mut order: Vec<Key> = notices.iter().map(|notice| notice.key).collect();
            order.sort_unstable();
            order.dedup();
            self.net.net().dice.shuffle(&mut order);
            let place = |key: Key| order.iter().position(|one| *one == key);
            notices.sort_by_key(|notice| place(notice.key));
        }
        put_off
    }

    /// Reports one registration.
    fn report(&mut self, key: Key, notices: &mut Vec<Notice>) {
        let Some(registration) = self.registrations.get_mut(&key) else { return };
        registration.delayed = false;
        let file = registration.file.file;
        let state = registration.state;
        let mut ready = self.net.net().poll(file);
        ready.set(Readiness::PRI, self.reports_urgent && ready.contains(Readiness::PRI));
        match state {
            Registered::Armed => {
                self.net.net().edges.remove(&file);
                if self.strikes(Knob::NoticeLost) {
                    notices.push(Notice { key, readiness: Ok(Readiness::empty()), armed: false });
                    return self.end(key);
                }
                let ends = self.strikes(Knob::RegistrationEnds);
                if self.strikes(Knob::NoticeTwice) {
                    notices.push(Notice { key, readiness: Ok(ready), armed: true });
                }
                notices.push(Notice { key, readiness: Ok(ready), armed: !ends });
                if ends {
                    self.end(key);
                }
            }
            Registered::Failing => {
                notices.push(Notice { key, readiness: Err(Errno::NOMEM), armed: false });
                self.end(key);
            }
            Registered::Removed => {
                if self.strikes(Knob::NoticeAfterRemoval) {
                    return notices.push(Notice { key, readiness: Ok(ready), armed: true });
                }
                notices.push(Notice { key, readiness: Err(Errno::CANCELED), armed: false });
                self.end(key);
            }
        }
    }

    fn end(&mut self, key: Key) {
        // This may close the file.
        let registration = self.registrations.remove(&key);
        drop(registration);
        self.ended.push_back(key);
        if self.ended.len() > ENDED_MAX {
            self.ended.pop_front();
        }
    }

    /// Reports the current state of a registration without a change.
    fn report_any(&mut self, notices: &mut Vec<Notice>) {
        if self.registrations.is_empty() || !self.strikes(Knob::NoticeSpurious) {
            return;
        }
        let last = u64::try_from(self.registrations.len() - 1).unwrap_or(0);
        let chosen = usize::try_from(self.roll(0, last)).unwrap_or(0);
        let key = self.registrations.iter().nth(chosen).filter(|(_, one)| one.state == Registered::Armed);
        if let Some(key) = key.map(|(key, _)| *key) {
            self.report(key, notices);
        }
    }

    /// Reports registrations that have ended, unless they were created again.
    fn report_ended(&mut self, notices: &mut Vec<Notice>) {
        if notices.is_empty() || self.ended.is_empty() || !self.strikes(Knob::NoticeStale) {
            return;
        }
        let last = u64::try_from(self.ended.len() - 1).unwrap_or(0);
        let chosen = usize::try_from(self.roll(0, last)).unwrap_or(0);
        let key = self.ended[chosen];
        let pending = notices.iter().any(|notice| notice.key == key);
        if !self.registrations.contains_key(&key) && !pending {
            notices.push(Notice { key, readiness: Ok(Readiness::all()), armed: true });
        }
    }
}

impl fmt::Debug for FakePoller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let registrations = self.registrations.values();
        let list = registrations.map(|one| (one.file.file, one.state, self.net.net().poll(one.file.file)));
        f.debug_list().entries(list).finish()
    }
}

impl Poller for FakePoller {
    type Io = FakeIo;

    fn reports_urgent(&self) -> bool {
        self.reports_urgent
    }

    fn arm(&mut self, socket: &FakeSocket, key: Key) -> Result<(), Errno> {
        assert!(!self.registrations.contains_key(&key), "{key:?} is registered twice");
        if self.strikes(Knob::RegistrationRefused) {
            return Err(Errno::NOSPC);
        }
        let fails = self.strikes(Knob::RegistrationFails);
        let state = if fails { Registered::Failing } else { Registered::Armed };
        let file = socket.0.clone();
        // The first notice reports the current state.
        self.net.net().edges.insert(file.file);
        self.registrations.insert(key, Registration { file, not_before: 0, delayed: false, state });
        Ok(())
    }

    fn disarm(&mut self, _: &FakeSocket, key: Key, _: bool) -> bool {
        match self.registrations.get_mut(&key) {
            Some(registration) => {
                registration.state = Registered::Removed;
                registration.delayed = false;
                false
            }
            // It has ended, and its last notice is queued or was delivered.
            None => true,
        }
    }

    fn wait(&mut self, until: Option<Instant>, notices: &mut Vec<Notice>) -> Result<(), ReactorError> {
        loop {
            self.net.net().turns += 1;
            self.net.net().changed = false;
            self.net.net().run_due();
            let put_off = self.collect(notices);
            // The change may concern a far end, so the simulation acts next.
            let changed = self.net.net().changed;
            if !notices.is_empty() || changed || self.strikes(Knob::SpuriousWakeup) {
                return Ok(());
            }
            let now = self.net.net().now;
            if until.is_some_and(|until| until <= now) {
                return Ok(());
            }
            if put_off {
                continue;
            }
            let Some(next) = self.net.net().next_due().into_iter().chain(until).min() else {
                self.net.net().deadlocked = true;
                return Ok(());
            };
            let net = &mut *self.net.net();
            net.now = net.now.max(next);
            if [net.act_at, net.no_buffer_until].into_iter().flatten().any(|at| at <= net.now) {
                net.run_due();
                return Ok(());
            }
        }
    }

    fn waker(&self) -> Waker {
        Waker::none()
    }
}
