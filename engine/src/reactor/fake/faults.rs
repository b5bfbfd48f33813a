//! The faults of a simulated kernel. Each is a knob with a probability, and its occurrences are counted, so that a test
//! detects a knob that has no effect.

/// A seeded random source (splitmix64): the same seed gives the same run.
#[derive(Clone, Debug)]
pub struct Dice(u64);

impl Dice {
    /// Creates dice from a seed.
    pub fn new(seed: u64) -> Dice {
        Dice(seed)
    }

    /// Returns the next 64 bits.
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut bits = self.0;
        bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        bits ^ (bits >> 31)
    }

    /// Returns a number from `low` to `high`, both included.
    pub fn range(&mut self, low: u64, high: u64) -> u64 {
        low + self.bits() % (high.saturating_sub(low) + 1)
    }

    /// Returns a size from `low` to `high`, both included.
    pub fn size(&mut self, low: usize, high: usize) -> usize {
        let spread = u64::try_from(high.saturating_sub(low)).unwrap_or(u64::MAX);
        low + usize::try_from(self.range(0, spread)).unwrap_or(0)
    }

    /// True `per_mille` times in a thousand.
    pub fn chance(&mut self, per_mille: u16) -> bool {
        per_mille > 0 && self.range(1, 1000) <= u64::from(per_mille)
    }

    /// Shuffles `items`.
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            let other = self.size(0, last);
            items.swap(last, other);
        }
    }
}

macro_rules! knobs {
    ($($(#[$doc:meta])* $name:ident: $most:literal,)*) => {
        /// A fault, or a rare event that a shard must handle.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Knob { $($(#[$doc])* $name,)* }

        impl Knob {
            /// Every knob.
            pub const ALL: &[Knob] = &[$(Knob::$name),*];
            /// The maximum of each random probability, per thousand. 0: the fault results from others.
            const MOST: &[u16] = &[$($most),*];
        }
    };
}

knobs! {
    /// A read returns less than is available; the rest is reported again, as if it had just arrived.
    ShortRecv: 800,
    /// A send accepts less than there is room for; room is reported soon.
    ShortSend: 800,
    /// An urgent byte arrives: reads stop before it, and splices do not pass it.
    Urgent: 300,
    /// A notice is some turns late.
    Delayed: 500,
    /// The notices of one turn have another order.
    Reordered: 1000,
    /// A wait ends without a reason.
    SpuriousWakeup: 200,
    /// A notice is repeated.
    NoticeTwice: 300,
    /// A notice reports nothing new.
    NoticeSpurious: 100,
    /// A notice arrives for a registration that has ended, and whose entry may have been reused.
    NoticeStale: 300,
    /// A registration ends with a notice of its readiness, as a multishot poll does when completions overflow.
    RegistrationEnds: 200,
    /// A registration ends, and its readiness is not reported.
    NoticeLost: 100,
    /// A registration is refused.
    RegistrationRefused: 20,
    /// A registration fails after it was accepted.
    RegistrationFails: 20,
    /// A removed registration takes some turns to end, and holds its file until then.
    RemovedLate: 800,
    /// A removed registration reports once more before it ends.
    NoticeAfterRemoval: 300,
    /// No buffer is lent, although one is free.
    NoBuffer: 100,
    /// No pipe is lent, although one is free.
    NoPipe: 500,
    /// A connect finishes within the call.
    ConnectAtOnce: 500,
    /// A connect is refused.
    ConnectRefused: 100,
    /// The kernel gives up a connect.
    ConnectTimedOut: 30,
    /// A connect is never answered.
    ConnectUnanswered: 30,
    /// A connect finds no route.
    ConnectUnreachable: 50,
    /// A connect finds no free port.
    PortsExhausted: 50,
    /// A socket connects to itself.
    OwnPeer: 200,
    /// A connect is slow.
    SlowConnect: 500,
    /// The server resets a connection right after it was established.
    ResetOnConnect: 0,
    /// An accept finds no descriptor.
    AcceptExhausted: 100,
    /// An accept returns the error of a connection instead of the connection.
    AcceptStray: 100,
    /// A listener fails for some time.
    AcceptFails: 10,
    /// No descriptor is free for a socket of the host.
    NoHostSocket: 50,
    /// The opener has no free descriptors.
    StockExhausted: 300,
    /// The opener does not create sockets of this family.
    StockRefused: 20,
    /// The opener has ended, which the request reports.
    StockGone: 10,
    /// The opener sends invalid sockets.
    StockHostile: 10,
    /// The opener is slow.
    StockSlow: 500,
    /// The opener sends fewer sockets than requested.
    StockFewer: 800,
    /// The channel is full for some time.
    ChannelFull: 300,
    /// A driver connects slowly, perhaps too slowly.
    DialSlow: 500,
    /// A driver never answers.
    DialUnanswered: 30,
    /// A driver reports that no server listens.
    DialRefused: 100,
    /// A driver reports that its own connect timed out.
    DialTimedOut: 50,
    /// A driver has no free descriptors.
    DialExhausted: 50,
    /// The socket of an answer is lost for lack of descriptors.
    DialLost: 50,
    /// The driver ends, which the channel reports.
    DriverGone: 10,
    /// The peer's kernel is slow to receive and acknowledge bytes.
    SlowAcknowledge: 300,
    /// A FIN could not be sent because the connection was reset.
    FinFailed: 0,
    /// A send found its connection reset.
    SendFailed: 0,
    /// A reset discarded bytes in flight.
    ResetDiscarded: 0,
    /// A send returned the error of a reset, and a read returned an end instead.
    ResetReadAsEof: 0,
}

/// The knobs of a run: their probabilities, and the numbers of their occurrences.
#[derive(Clone, Debug)]
pub struct Faults {
    chances: Vec<u16>,
    fired: Vec<u64>,
}

impl Faults {
    /// Creates knobs that are off.
    pub fn none() -> Faults {
        Faults { chances: vec![0; Knob::ALL.len()], fired: vec![0; Knob::ALL.len()] }
    }

    /// Turns knobs on and off at random.
    pub fn random(dice: &mut Dice) -> Faults {
        let mut faults = Faults::none();
        for (chance, most) in faults.chances.iter_mut().zip(Knob::MOST) {
            if *most > 0 && dice.chance(600) {
                *chance = u16::try_from(dice.range(1, u64::from(*most))).unwrap_or(0);
            }
        }
        faults
    }

    /// Sets the probability of a knob, per thousand.
    pub fn set(&mut self, knob: Knob, per_mille: u16) {
        self.chances[knob as usize] = per_mille;
    }

    /// Returns how many times a knob took effect.
    pub fn fired(&self, knob: Knob) -> u64 {
        self.fired[knob as usize]
    }

    /// Decides at random whether a fault occurs, which the caller then carries out.
    pub(super) fn strikes(&mut self, knob: Knob, dice: &mut Dice) -> bool {
        let strikes = dice.chance(self.chances[knob as usize]);
        if strikes {
            self.note(knob);
        }
        strikes
    }

    /// Counts a fault that resulted from others.
    pub(super) fn note(&mut self, knob: Knob) {
        self.fired[knob as usize] += 1;
    }
}
