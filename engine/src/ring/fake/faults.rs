//! What a simulated ring does to its shard: each fault is a knob with a chance, and each counts how often it fired, since
//! a knob that never fires is worse than none: it is believed.

/// A seeded source of chance (splitmix64): the same seed, the same run.
#[derive(Clone, Debug)]
pub struct Dice(u64);

impl Dice {
    /// Dice of a seed.
    pub fn new(seed: u64) -> Dice {
        Dice(seed)
    }

    /// The next 64 bits.
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut bits = self.0;
        bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        bits ^ (bits >> 31)
    }

    /// A number from `low` to `high`, both included.
    pub fn range(&mut self, low: u64, high: u64) -> u64 {
        low + self.bits() % (high.saturating_sub(low) + 1)
    }

    /// A size from `low` to `high`, both included.
    pub fn size(&mut self, low: usize, high: usize) -> usize {
        let spread = u64::try_from(high.saturating_sub(low)).unwrap_or(u64::MAX);
        low + usize::try_from(self.range(0, spread)).unwrap_or(0)
    }

    /// True `per_mille` times in a thousand.
    pub fn chance(&mut self, per_mille: u16) -> bool {
        per_mille > 0 && self.range(1, 1000) <= u64::from(per_mille)
    }

    /// Puts `items` into an order of chance.
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            let other = self.size(0, last);
            items.swap(last, other);
        }
    }
}

macro_rules! knobs {
    ($($(#[$doc:meta])* $name:ident: $most:literal,)*) => {
        /// A fault, or something else that a shard must be ready for and that rarely happens.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Knob { $($(#[$doc])* $name,)* }

        impl Knob {
            /// Every knob.
            pub const ALL: &[Knob] = &[$(Knob::$name),*];
            /// The highest chance that a random setting gives each, in a thousand. 0: it happens by itself.
            const MOST: &[u16] = &[$($most),*];
        }
    };
}

knobs! {
    /// A read finds less than there is.
    ShortRecv: 800,
    /// A send takes less than there is room for, and goes on later.
    ShortSend: 800,
    /// An operation is over at once.
    Done: 1000,
    /// A completion comes some turns late.
    Delayed: 500,
    /// Completions of one turn come in another order.
    Reordered: 1000,
    /// A wait ends for no reason.
    SpuriousWakeup: 200,
    /// A cancelled operation takes some turns to end.
    CancelLate: 800,
    /// A cancelled operation was over already, and says what it came to.
    CancelLost: 800,
    /// No buffer, though there would be one.
    NoLease: 100,
    /// No pipe, though there would be one.
    NoPipe: 500,
    /// A connect is refused.
    ConnectRefused: 100,
    /// A connect is given up by the kernel.
    ConnectTimedOut: 30,
    /// A connect is never answered.
    ConnectUnanswered: 30,
    /// A connect finds no route.
    ConnectUnreachable: 50,
    /// A connect finds no free port.
    PortsExhausted: 50,
    /// A socket connects to itself.
    OwnPeer: 50,
    /// A connect takes its time.
    SlowConnect: 500,
    /// An accept finds no descriptor.
    AcceptExhausted: 100,
    /// An accept tells an error of the connection that it would have taken.
    AcceptStray: 100,
    /// The opener is out of descriptors.
    StockExhausted: 300,
    /// The opener does not make sockets of this family.
    StockRefused: 20,
    /// The opener has ended, and the request is what tells.
    StockGone: 10,
    /// The opener hands over something else.
    StockHostile: 10,
    /// The opener takes its time.
    StockSlow: 500,
    /// The opener hands over fewer than asked for.
    StockFewer: 800,
    /// The channel to a driver is full for a while.
    ChannelFull: 300,
    /// A driver takes its time to dial, perhaps too long.
    DialSlow: 500,
    /// A driver never answers.
    DialUnanswered: 30,
    /// A driver says that nobody listens.
    DialRefused: 100,
    /// A driver says that it got no answer itself.
    DialTimedOut: 50,
    /// A driver is out of descriptors.
    DialExhausted: 50,
    /// The socket of an answer got lost for want of descriptors.
    DialLost: 50,
    /// The driver has gone, and the wait for its answers is what tells.
    DriverGone: 10,
    /// The peer's kernel takes its time to take bytes in and to acknowledge them.
    SlowAcknowledge: 300,
    /// A watch saw a FIN and tells nothing any more until it is cancelled.
    WatchAsleep: 1000,
    /// A FIN could not be sent, for the connection was reset.
    FinFailed: 0,
    /// A send found its connection reset.
    SendFailed: 0,
    /// A reset threw away what was on its way.
    ResetDiscarded: 0,
    /// The error of a reset was told to a send, and a read saw an end instead.
    ResetReadAsEof: 0,
    /// A cancelled send gave its loan back with bytes in it.
    SendCancelled: 0,
}

/// The knobs of a run: how likely each is, and how often it fired.
#[derive(Clone, Debug)]
pub struct Faults {
    chances: Vec<u16>,
    fired: Vec<u64>,
}

impl Faults {
    /// No faults at all.
    pub fn none() -> Faults {
        Faults { chances: vec![0; Knob::ALL.len()], fired: vec![0; Knob::ALL.len()] }
    }

    /// Some knobs on, some off, by chance.
    pub fn random(dice: &mut Dice) -> Faults {
        let mut faults = Faults::none();
        for (chance, most) in faults.chances.iter_mut().zip(Knob::MOST) {
            if *most > 0 && dice.chance(600) {
                *chance = u16::try_from(dice.range(1, u64::from(*most))).unwrap_or(0);
            }
        }
        faults
    }

    /// Sets a knob, in a thousand.
    pub fn set(&mut self, knob: Knob, per_mille: u16) {
        self.chances[knob as usize] = per_mille;
    }

    /// How often a knob fired.
    pub fn fired(&self, knob: Knob) -> u64 {
        self.fired[knob as usize]
    }

    /// Rolls for a fault that its caller then makes happen.
    pub(super) fn strikes(&mut self, knob: Knob, dice: &mut Dice) -> bool {
        let strikes = dice.chance(self.chances[knob as usize]);
        if strikes {
            self.note(knob);
        }
        strikes
    }

    /// Rolls for something that counts only once it came to pass, by [`Faults::note`].
    pub(super) fn might(&self, knob: Knob, dice: &mut Dice) -> bool {
        dice.chance(self.chances[knob as usize])
    }

    /// Counts what happened.
    pub(super) fn note(&mut self, knob: Knob) {
        self.fired[knob as usize] += 1;
    }
}
