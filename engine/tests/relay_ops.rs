//! The machine of one connection against a model of its shard: any order of completions, any crossing of cancels.

use std::time::{Duration, Instant};

use landfall_engine::error::EndReason;
use landfall_engine::limits::Limits;
use landfall_engine::relay::{Action, Actions, Connection, Direction, Input, Operation, ReadEnd, Side};
use proptest::prelude::*;

/// What is in flight for one place, as a shard would know it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Flight {
    Read,
    Write,
    Watch,
}

/// A shard that keeps to the contract, and checks that the machine does.
struct Model {
    machine: Connection,
    limits: Limits,
    now: Instant,
    flights: [Option<Flight>; Operation::PLACES],
    cancelled: [bool; Operation::PLACES],
    /// Bytes read and not yet written, by direction.
    held: [usize; 2],
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
            flights: [None; Operation::PLACES],
            cancelled: [false; Operation::PLACES],
            held: [0; 2],
            eof: [false; 2],
            fins: [0; 2],
            deadline: false,
            measuring: None,
            finished: 0,
        };
        model.feed(Input::Begin);
        model
    }

    fn feed(&mut self, input: Input) {
        let mut actions = Actions::new();
        self.machine.on(input, self.now, &self.limits, &mut actions);
        for action in actions {
            assert_eq!(self.finished, 0, "{action:?} after the end");
            self.carry_out(action);
        }
    }

    fn start(&mut self, operation: Operation, flight: Flight) {
        let place = operation.place();
        assert_eq!(self.flights[place], None, "{operation:?} twice");
        self.flights[place] = Some(flight);
        self.cancelled[place] = false;
    }

    fn carry_out(&mut self, action: Action) {
        match action {
            Action::Read { direction, .. } => {
                assert_eq!(self.held[direction as usize], 0, "a read while bytes are owed");
                self.start(Operation::Half(direction), Flight::Read);
            }
            Action::Write(direction) => {
                assert_ne!(self.held[direction as usize], 0, "a write of nothing");
                self.start(Operation::Half(direction), Flight::Write);
            }
            Action::SendFin(side) => {
                let direction = side.incoming();
                assert!(self.eof[direction as usize], "a FIN that nobody sent");
                assert_eq!(self.held[direction as usize], 0, "a FIN before the bytes");
                self.fins[side as usize] += 1;
                assert_eq!(self.fins[side as usize], 1, "a second FIN");
            }
            Action::Watch(side) => self.start(Operation::Watch(side), Flight::Watch),
            Action::Cancel(operation) => {
                assert!(self.flights[operation.place()].is_some(), "{operation:?} is not in flight");
                self.cancelled[operation.place()] = true;
            }
            Action::MeasureUnacknowledged(side) => self.measuring = Some(side),
            Action::SetDeadline(_) => self.deadline = true,
            Action::Finish { reset, reason } => {
                assert_eq!(self.flights, [None; Operation::PLACES], "the end while something is in flight");
                if reason == EndReason::Completed {
                    assert_eq!((reset, self.fins), ([false; 2], [1; 2]), "a clean end has two FINs");
                } else {
                    assert_eq!(reset, [true; 2]);
                }
                self.finished += 1;
            }
        }
    }

    /// Lets something happen that may happen now. `dice` chooses.
    fn step(&mut self, dice: u32) {
        if let Some(side) = self.measuring.take() {
            let bytes = if dice.is_multiple_of(3) { 0 } else { 7 };
            return self.feed(Input::Unacknowledged(side, bytes));
        }
        let (place, kind) = (dice as usize % 6, dice / 6);
        let Some(operation) = Operation::of_index(place).filter(|_| place < Operation::PLACES) else {
            return self.happen_by_itself(kind);
        };
        let Some(flight) = self.flights[place] else { return };
        let cancelled = self.cancelled[place] && kind.is_multiple_of(2);
        // A write that is told to be blocked stays in flight.
        if let (Flight::Write, Operation::Half(direction), 5) = (flight, operation, kind % 6) {
            return self.feed(Input::Blocked(direction));
        }
        self.flights[place] = None;
        let input = if cancelled {
            if let Operation::Half(direction) = operation {
                self.held[direction as usize] = 0;
            }
            Input::Cancelled(operation)
        } else {
            self.end_of(operation, flight, kind)
        };
        self.feed(input);
    }

    fn end_of(&mut self, operation: Operation, flight: Flight, kind: u32) -> Input {
        match (operation, flight) {
            (Operation::Half(direction), Flight::Write) => {
                self.held[direction as usize] = 0;
                if kind % 6 == 4 { Input::WriteFailed(direction) } else { Input::Wrote(direction) }
            }
            (Operation::Half(direction), _) => Input::Read(direction, self.read_end(direction, kind)),
            (Operation::Watch(side), _) => Input::Broke(side),
            (Operation::Connect, _) => Input::Begin,
        }
    }

    fn read_end(&mut self, direction: Direction, kind: u32) -> ReadEnd {
        match kind % 8 {
            0 => {
                self.eof[direction as usize] = true;
                ReadEnd::Eof
            }
            1 => ReadEnd::Broken,
            2 => ReadEnd::NoLoan,
            size => {
                // The machine need not take them: nobody may be left to have them. Then no write follows.
                self.held[direction as usize] = size as usize;
                ReadEnd::Bytes { bytes: size as usize, full: size > 4 }
            }
        }
    }

    fn happen_by_itself(&mut self, kind: u32) {
        match kind % 5 {
            0 => self.feed(Input::LoanFree(Direction::Up)),
            1 => self.feed(Input::LoanFree(Direction::Down)),
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
    (0..16, direction, side, 0..5usize, 0..9usize).prop_map(|(kind, direction, side, operation, bytes)| {
        match kind {
            0 => Input::Begin,
            1..=4 => Input::Read(direction, ReadEnd::Bytes { bytes: bytes + 1, full: bytes > 4 }),
            5 => Input::Read(direction, ReadEnd::Eof),
            6 => Input::Read(direction, ReadEnd::Broken),
            7 => Input::Read(direction, ReadEnd::NoLoan),
            8 => Input::LoanFree(direction),
            9 => Input::Blocked(direction),
            10 => Input::Wrote(direction),
            11 => Input::WriteFailed(direction),
            12 => Input::Broke(side),
            13 => Input::Cancelled(Operation::of_index(operation).unwrap_or(Operation::Connect)),
            14 => Input::Unacknowledged(side, bytes),
            _ => Input::Deadline,
        }
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
        // However it stands, an abort and the ends of what is in flight are the end of it.
        model.feed(Input::Abort(EndReason::Removed));
        for place in 0..Operation::PLACES {
            if model.flights[place].take().is_some()
                && let Some(operation) = Operation::of_index(place)
            {
                model.feed(Input::Cancelled(operation));
            }
        }
        prop_assert_eq!(model.finished, 1);
        prop_assert!(model.machine.is_finished());
    }

    #[test]
    fn no_input_is_too_strange(inputs in proptest::collection::vec(any_input(), 0..200)) {
        let (mut machine, limits, now) = (Connection::new(), Limits::default(), Instant::now());
        let mut actions = Actions::new();
        for input in inputs {
            machine.on(input, now, &limits, &mut actions);
        }
        let ends = actions.iter().filter(|action| matches!(action, Action::Finish { .. })).count();
        prop_assert!(ends <= 1, "it ended {ends} times");
    }
}
