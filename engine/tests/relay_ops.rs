//! The state machine of one connection against a model of its shard, with events in any order.

use std::time::{Duration, Instant};

use landfall_engine::error::EndReason;
use landfall_engine::limits::Limits;
use landfall_engine::reactor::TransferMode;
use landfall_engine::relay::{Action, Actions, Connection, Direction, Input, ReadEnd, Side};
use proptest::prelude::*;

/// The activity of a direction, from the view of a shard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Flow {
    Idle,
    Reading,
    Starved,
    /// The shard holds bytes of the direction.
    Blocked,
}

/// A shard that keeps the contract, and checks that the machine does.
struct Model {
    machine: Connection,
    limits: Limits,
    now: Instant,
    flows: [Flow; 2],
    eof: [bool; 2],
    fins: [u32; 2],
    deadline: bool,
    measuring: Option<Side>,
    finished: u32,
}

impl Model {
    fn new() -> Model {
        let mut model = Model {
            machine: Connection::new(),
            limits: Limits::default(),
            now: Instant::now(),
            flows: [Flow::Idle; 2],
            eof: [false; 2],
            fins: [0; 2],
            deadline: false,
            measuring: None,
            finished: 0,
        };
        model.feed(Input::Start);
        model
    }

    fn feed(&mut self, input: Input) {
        let mut actions = Actions::new();
        self.machine.on(input, self.now, &self.limits, &mut actions);
        for action in actions {
            assert_eq!(self.finished, 0, "{action:?} after the end");
            self.carry_out(action);
        }
        if self.finished > 0 {
            return;
        }
        for direction in Direction::ALL {
            let flow = &mut self.flows[direction as usize];
            assert_eq!(self.machine.is_blocked(direction), *flow == Flow::Blocked, "{direction:?}");
            if self.machine.reads(direction).is_none() && *flow == Flow::Reading {
                // The direction stops reading without an action.
                *flow = Flow::Idle;
            }
            assert_eq!(self.machine.reads(direction).is_some(), *flow == Flow::Reading, "{direction:?}");
        }
    }

    fn carry_out(&mut self, action: Action) {
        match action {
            Action::Read(direction) => {
                let flow = &mut self.flows[direction as usize];
                assert_ne!(*flow, Flow::Blocked, "a read while bytes are owed");
                *flow = Flow::Reading;
            }
            Action::Discard(direction) => {
                let flow = &mut self.flows[direction as usize];
                assert_eq!(*flow, Flow::Blocked, "no bytes are held");
                *flow = Flow::Idle;
            }
            Action::SendFin(side) => {
                let direction = side.incoming();
                assert!(self.eof[direction as usize], "a FIN that no peer sent");
                assert_eq!(self.flows[direction as usize], Flow::Idle, "a FIN before the bytes");
                assert_eq!(self.fins[side as usize], 0, "a second FIN");
                assert_eq!(self.fins[side.other() as usize], 0, "the last FIN is the close's");
                self.fins[side as usize] = 1;
            }
            Action::MeasureUnacknowledged(side) => self.measuring = Some(side),
            Action::SetDeadline(_) => self.deadline = true,
            Action::Finish { reset, reason } => {
                if reason == EndReason::Completed {
                    assert_eq!((reset, self.eof), ([false; 2], [true; 2]), "a clean end has two FINs");
                    assert_eq!(self.fins[0] + self.fins[1], 1, "the close sends the other one");
                    assert_eq!(self.flows, [Flow::Idle; 2], "the end before the bytes");
                } else {
                    assert_eq!(reset, [true; 2]);
                    self.flows = [Flow::Idle; 2];
                }
                self.finished += 1;
            }
        }
    }

    /// Generates an event that is possible now; `dice` chooses it.
    fn step(&mut self, dice: u32) {
        if let Some(side) = self.measuring.take() {
            let bytes = if dice.is_multiple_of(3) { 0 } else { 7 };
            return self.feed(Input::Unacknowledged(side, bytes));
        }
        let direction = if dice.is_multiple_of(2) { Direction::Up } else { Direction::Down };
        let kind = dice / 2;
        if kind.is_multiple_of(3) {
            return self.happen_by_itself(kind / 3);
        }
        let kind = kind / 3;
        match self.flows[direction as usize] {
            Flow::Idle => {}
            Flow::Starved => {
                self.flows[direction as usize] = Flow::Idle;
                self.feed(Input::BufferFree(direction));
            }
            Flow::Blocked => {
                let failed = kind.is_multiple_of(5);
                self.flows[direction as usize] = Flow::Idle;
                self.feed(if failed { Input::WriteFailed(direction) } else { Input::Wrote(direction) });
            }
            Flow::Reading => self.read(direction, kind),
        }
    }

    fn read(&mut self, direction: Direction, kind: u32) {
        let (flow, input) = match kind % 10 {
            0 => {
                self.eof[direction as usize] = true;
                (Flow::Idle, Input::Read(direction, ReadEnd::Eof))
            }
            1 => (Flow::Idle, Input::Read(direction, ReadEnd::Broken)),
            2 => (Flow::Starved, Input::Read(direction, ReadEnd::Unavailable(TransferMode::Copy))),
            3 => (Flow::Idle, Input::Read(direction, ReadEnd::Unavailable(TransferMode::Splice))),
            4 => (Flow::Blocked, Input::Blocked(direction)),
            5 => (Flow::Idle, Input::WriteFailed(direction)),
            bytes => {
                self.machine.moved(direction, bytes as usize, bytes > 7, &self.limits);
                return;
            }
        };
        self.flows[direction as usize] = flow;
        self.feed(input);
    }

    fn happen_by_itself(&mut self, kind: u32) {
        match kind % 6 {
            0 => self.feed(Input::Broke(Side::Downstream)),
            1 => self.feed(Input::Broke(Side::Upstream)),
            2 if self.deadline => {
                self.now += Duration::from_millis(u64::from(kind % 400));
                self.feed(Input::Deadline);
            }
            3 if kind % 35 == 33 => self.feed(Input::Abort(EndReason::Removed)),
            // Only a side to which the FIN was just sent can refuse it.
            4 if self.fins[0] == 1 && kind % 10 == 4 => self.feed(Input::FinFailed(Side::Downstream)),
            _ => {}
        }
    }
}

fn any_input() -> impl Strategy<Value = Input> {
    let direction = prop_oneof![Just(Direction::Up), Just(Direction::Down)];
    let side = prop_oneof![Just(Side::Downstream), Just(Side::Upstream)];
    (0..14, direction, side, 0..9usize).prop_map(|(kind, direction, side, bytes)| match kind {
        0 => Input::Start,
        1 => Input::Read(direction, ReadEnd::Eof),
        2 => Input::Read(direction, ReadEnd::Broken),
        3 => Input::Read(direction, ReadEnd::Unavailable(TransferMode::Copy)),
        4 => Input::Read(direction, ReadEnd::Unavailable(TransferMode::Splice)),
        5 => Input::BufferFree(direction),
        6 => Input::Blocked(direction),
        7 => Input::Wrote(direction),
        8 => Input::WriteFailed(direction),
        9 => Input::Broke(side),
        10 => Input::FinFailed(side),
        11 | 12 => Input::Unacknowledged(side, bytes),
        _ => Input::Deadline,
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]

    #[test]
    fn the_contract_holds_in_any_order(dice in proptest::collection::vec(any::<u32>(), 0..300)) {
        let mut model = Model::new();
        for die in dice {
            model.step(die);
        }
        // In any state, an abort ends the connection.
        model.feed(Input::Abort(EndReason::Removed));
        prop_assert_eq!(model.finished, 1);
        prop_assert!(model.machine.is_finished());
    }

    #[test]
    fn any_sequence_of_inputs_ends_at_most_once(inputs in proptest::collection::vec(any_input(), 0..200)) {
        let (mut machine, limits, now) = (Connection::new(), Limits::default(), Instant::now());
        let mut actions = Actions::new();
        for input in inputs {
            machine.on(input, now, &limits, &mut actions);
        }
        let ends = actions.iter().filter(|action| matches!(action, Action::Finish { .. })).count();
        prop_assert!(ends <= 1, "it ended {ends} times");
    }
}
