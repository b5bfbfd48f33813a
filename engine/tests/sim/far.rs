//! The far ends: a client on the host or a server inside. Each has its own script that does not depend on the other, so a
//! run always ends.

use std::time::{Duration, Instant};

use landfall_engine::reactor::fake::{Dice, EndId, FakeNet, FarRead};

/// The way in which a far end finishes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Finish {
    /// A FIN after the last byte; then it reads to the end.
    Fin,
    /// A reset after a number of bytes.
    Reset,
    /// A close after the last byte, even if there are bytes to read.
    Close,
    /// A FIN, and later a reset.
    FinThenReset,
}

/// The end of the incoming stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum StreamEnd {
    Eof,
    Reset,
}

#[derive(Debug)]
pub(crate) struct Far {
    pub(crate) id: EndId,
    /// The number of the stream that it sends.
    pub(crate) stream: u32,
    pub(crate) is_client: bool,
    pub(crate) finish: Finish,
    total: u64,
    chunk: usize,
    pause: Duration,
    gulp: usize,
    read_pause: Duration,
    /// The position at which it stops reading for some time.
    stall: Option<(u64, Duration)>,
    /// The time of the reset of `FinThenReset`.
    reset_at: Option<Instant>,
    write_at: Instant,
    read_at: Instant,
    pub(crate) sent: u64,
    pub(crate) read: u64,
    pub(crate) fin: bool,
    /// Whether it has ended the connection itself, so that it sees no end.
    pub(crate) left: bool,
    pub(crate) end_seen: Option<StreamEnd>,
    /// Whether a reset followed the end that it saw.
    pub(crate) cut: bool,
    /// The number of the stream that it receives.
    pub(crate) receives: Option<u32>,
}

impl Far {
    /// Creates a far end that sends `most` bytes at most.
    pub(crate) fn new(
        id: EndId,
        stream: u32,
        is_client: bool,
        most: u64,
        dice: &mut Dice,
        now: Instant,
    ) -> Far {
        let finish = match dice.range(0, 9) {
            0 => Finish::Reset,
            1 => Finish::Close,
            2 => Finish::FinThenReset,
            _ => Finish::Fin,
        };
        let total = match dice.range(0, 5) {
            0 => 0,
            1 | 2 => dice.range(1, 50),
            3 => dice.range(1, 2_000),
            _ => dice.range(1, 40_000),
        }
        .min(most);
        let pause = |dice: &mut Dice| match dice.range(0, 3) {
            0 => Duration::from_micros(dice.range(1, 5_000)),
            _ => Duration::ZERO,
        };
        let stall =
            dice.chance(250).then(|| (dice.range(0, 5_000), Duration::from_millis(dice.range(1, 800))));
        Far {
            id,
            stream,
            is_client,
            finish,
            total,
            chunk: dice.size(1, 4_000),
            pause: pause(dice),
            gulp: dice.size(1, 4_000),
            read_pause: pause(dice),
            stall,
            reset_at: None,
            write_at: now + pause(dice),
            read_at: now + pause(dice),
            sent: 0,
            read: 0,
            fin: false,
            left: false,
            end_seen: None,
            cut: false,
            receives: None,
        }
    }

    /// Whether it has finished.
    pub(crate) fn is_over(&self) -> bool {
        self.left
    }

    /// Carries out the steps that are due.
    pub(crate) fn step(&mut self, net: &FakeNet, dice: &mut Dice) -> Result<(), String> {
        if self.left {
            return Ok(());
        }
        let now = net.net().now();
        self.read_on(net, dice, now)?;
        self.write_on(net, dice, now);
        if self.reset_at.is_some_and(|at| at <= now) {
            net.net().reset(self.id);
            self.left = true;
        }
        self.cut = self.end_seen == Some(StreamEnd::Eof) && !self.left && net.net().is_broken(self.id);
        let over = match self.end_seen {
            Some(StreamEnd::Reset) => true,
            Some(StreamEnd::Eof) if self.cut => true,
            Some(StreamEnd::Eof) => self.fin && self.finish == Finish::Fin,
            None => false,
        };
        if over && !self.left {
            net.net().close(self.id);
            self.left = true;
        }
        Ok(())
    }

    fn write_on(&mut self, net: &FakeNet, dice: &mut Dice, now: Instant) {
        while !self.fin && !self.left && self.write_at <= now && self.end_seen != Some(StreamEnd::Reset) {
            if self.sent == self.total {
                self.end_writing(net, dice, now);
                return;
            }
            let most = usize::try_from(self.total - self.sent).unwrap_or(usize::MAX).min(self.chunk);
            let count = dice.size(1, most);
            match net.net().write(self.id, self.stream, self.sent, count) {
                // The read returns the reset.
                None | Some(0) => return,
                Some(taken) => self.sent += taken as u64,
            }
            self.write_at = now + self.pause;
        }
    }

    fn end_writing(&mut self, net: &FakeNet, dice: &mut Dice, now: Instant) {
        let mut net = net.net();
        match self.finish {
            Finish::Fin | Finish::FinThenReset => {
                self.fin = net.shutdown(self.id).is_ok();
                if self.finish == Finish::FinThenReset {
                    self.reset_at = Some(now + Duration::from_micros(dice.range(0, 20_000)));
                }
            }
            Finish::Reset => {
                net.reset(self.id);
                self.left = true;
            }
            Finish::Close => {
                self.fin = true;
                net.close(self.id);
                self.left = true;
            }
        }
    }

    fn read_on(&mut self, net: &FakeNet, dice: &mut Dice, now: Instant) -> Result<(), String> {
        while self.end_seen.is_none() && self.read_at <= now {
            if let Some((at, pause)) = self.stall
                && self.read >= at
            {
                self.stall = None;
                self.read_at = now + pause;
                return Ok(());
            }
            let most = dice.size(1, self.gulp);
            let got = net.net().read(self.id, most);
            match got {
                FarRead::Empty => return Ok(()),
                FarRead::Eof => self.end_seen = Some(StreamEnd::Eof),
                FarRead::Reset => self.end_seen = Some(StreamEnd::Reset),
                FarRead::Bytes(bytes) => {
                    for run in bytes.runs() {
                        let stream = *self.receives.get_or_insert(run.stream);
                        if run.stream != stream || run.start != self.read {
                            let (id, read) = (self.stream, self.read);
                            return Err(format!("{id} expected byte {read} of {stream} and got {run:?}"));
                        }
                        self.read += run.count as u64;
                    }
                    self.read_at = now + self.read_pause;
                }
            }
        }
        Ok(())
    }

    /// Returns the time of its next step, if it does not depend on the network.
    pub(crate) fn act_at(&self, now: Instant) -> Option<Instant> {
        if self.left {
            return None;
        }
        let times = [
            (!self.fin).then_some(self.write_at),
            self.end_seen.is_none().then_some(self.read_at),
            self.reset_at,
        ];
        times.into_iter().flatten().filter(|at| *at > now).min()
    }
}
