//! The faults of a simulated kernel: each is a knob with a chance, and each counts how often it fired, since a knob that
//! never fires is worse than none: it is believed.

/// A seeded source of chance (splitmix64): the same seed, the same run.
#[derive(Clone, Debug)]
pub struct Dice(u64);

impl Dice {
    /// Creates dice of a seed.
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
            /// The highest chance that a random setting gives each, in a thousand. 0: it happens by itself.
            const MOST: &[u16] = &[$($most),*];
        }
    };
}

knobs! {
    /// A read returns less than there is; the rest is reported again, as if it had just arrived.
    ShortRecv: 800,
    /// A send takes less than there is room for; room is reported soon.
    ShortSend: 800,
    /// An urgent byte arrives: reads stop before it, and splices do not pass it.
    Urgent: 300,
    /// A notice comes some turns late.
    Delayed: 500,
    /// Notices of one turn come in another order.
    Reordered: 1000,
    /// A wait ends for no reason.
    SpuriousWakeup: 200,
    /// A notice comes twice.
    NoticeTwice: 300,
    /// A notice reports nothing new.
    NoticeSpurious: 100,
    /// A notice comes for a registration that has ended, and whose place may have a successor.
    NoticeStale: 300,
    /// A registration ends with a notice that reports what happened, as a multishot poll does when completions overflow.
    RegistrationEnds: 200,
    /// A registration ends and what happened is not reported.
    NoticeLost: 100,
    /// A registration is refused.
    RegistrationRefused: 20,
    /// A registration fails after it was accepted.
    RegistrationFails: 20,
    /// A removed registration takes some turns to end, and holds its file until then.
    RemovedLate: 800,
    /// A removed registration reports once more before it ends.
    NoticeAfterRemoval: 300,
    /// No buffer, though one is free.
    NoBuffer: 100,
    /// No pipe, though one is free.
    NoPipe: 500,
    /// A connect is over within the call.
    ConnectAtOnce: 500,
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
    OwnPeer: 200,
    /// A connect takes its time.
    SlowConnect: 500,
    /// The server resets a connection right after it was established.
    ResetOnConnect: 0,
    /// An accept finds no descriptor.
    AcceptExhausted: 100,
    /// An accept returns an error of the connection that it would have taken.
    AcceptStray: 100,
    /// A listener fails for a while.
    AcceptFails: 10,
    /// No descriptor is left for a socket of the host.
    NoHostSocket: 50,
    /// The opener is out of descriptors.
    StockExhausted: 300,
    /// The opener does not make sockets of this family.
    StockRefused: 20,
    /// The opener has ended, and the request shows it.
    StockGone: 10,
    /// The opener hands over something else.
    StockHostile: 10,
    /// The opener takes its time.
    StockSlow: 500,
    /// The opener hands over fewer than asked for.
    StockFewer: 800,
    /// The channel is full for a while.
    ChannelFull: 300,
    /// A driver takes its time to connect, perhaps too long.
    DialSlow: 500,
    /// A driver never answers.
    DialUnanswered: 30,
    /// A driver reports that no server listens.
    DialRefused: 100,
    /// A driver reports that it got no answer itself.
    DialTimedOut: 50,
    /// A driver is out of descriptors.
    DialExhausted: 50,
    /// The socket of an answer is lost for want of descriptors.
    DialLost: 50,
    /// The driver ends, and the channel shows it.
    DriverGone: 10,
    /// The peer's kernel takes its time to take bytes in and to acknowledge them.
    SlowAcknowledge: 300,
    /// A FIN could not be sent because the connection was reset.
    FinFailed: 0,
    /// A send found its connection reset.
    SendFailed: 0,
    /// A reset threw away bytes on their way.
    ResetDiscarded: 0,
    /// The error of a reset was returned by a send, and a read saw an end instead.
    ResetReadAsEof: 0,
}

/// The knobs of a run: their chances, and how often they fired.
#[derive(Clone, Debug)]
pub struct Faults {
    chances: Vec<u16>,
    fired: Vec<u64>,
}

impl Faults {
    /// Creates knobs that never fire.
    pub fn none() -> Faults {
        Faults { chances: vec![0; Knob::ALL.len()], fired: vec![0; Knob::ALL.len()] }
    }

    /// Turns some knobs on and some off, by chance.
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

    /// Returns how often a knob fired.
    pub fn fired(&self, knob: Knob) -> u64 {
        self.fired[knob as usize]
    }

    /// Rolls for a fault, which the caller then carries out.
    pub(super) fn strikes(&mut self, knob: Knob, dice: &mut Dice) -> bool {
        let strikes = dice.chance(self.chances[knob as usize]);
        if strikes {
            self.note(knob);
        }
        strikes
    }

    /// Counts an event that the network brought about.
    pub(super) fn note(&mut self, knob: Knob) {
        self.fired[knob as usize] += 1;
    }
}
