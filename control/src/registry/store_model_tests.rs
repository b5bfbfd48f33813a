//! The registry against a model of it: random lives of a few containers, with daemons that stop and start in between.

use super::tests::{Bench, TURN, bare};
use super::*;

use futures_util::future::join_all;
use proptest::prelude::*;
use tokio::time::sleep;

use crate::docker::liveness::Liveness;

const NAMES: [&str; 4] = ["a", "b", "c", "d"];

#[derive(Clone, Debug)]
enum Change {
    Register(u8),
    Deregister,
}

#[derive(Clone, Debug)]
enum Step {
    /// Asked of one name at the same moment, in this order.
    Together(usize, Vec<Change>),
    /// What looks at a container find from here on.
    Find(usize, Liveness),
    /// So many turns pass.
    Turns(u32),
    /// The daemon stops, and the next one starts.
    Restart,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Entry {
    name: usize,
    folder: u8,
    misses: u32,
}

/// What the wire specification says, in a few lines.
#[derive(Default)]
struct Model {
    entries: Vec<Entry>,
    found: [Option<Liveness>; NAMES.len()],
}

impl Model {
    fn apply(&mut self, step: &Step) {
        match step {
            Step::Together(name, changes) => changes.iter().for_each(|change| self.change(*name, change)),
            Step::Find(name, liveness) => self.found[*name] = Some(*liveness),
            Step::Turns(turns) => (0..*turns).for_each(|_| self.turn()),
            Step::Restart => {
                let found = self.found;
                self.entries.retain(|entry| found[entry.name] != Some(Liveness::Gone));
                self.entries.iter_mut().for_each(|entry| entry.misses = 0);
            }
        }
    }

    fn change(&mut self, name: usize, change: &Change) {
        match *change {
            Change::Register(folder) => match self.entries.iter_mut().find(|entry| entry.name == name) {
                Some(entry) => *entry = Entry { name, folder, misses: 0 },
                None => self.entries.push(Entry { name, folder, misses: 0 }),
            },
            Change::Deregister => self.entries.retain(|entry| entry.name != name),
        }
    }

    fn turn(&mut self) {
        for entry in &mut self.entries {
            match self.found[entry.name] {
                Some(Liveness::Gone) => entry.misses += 1,
                Some(Liveness::Unknown) => {}
                Some(Liveness::Alive) | None => entry.misses = 0,
            }
        }
        self.entries.retain(|entry| entry.misses < 3);
    }

    fn shown(&self) -> Vec<(String, String)> {
        let shown = |entry: &Entry| (NAMES[entry.name].to_owned(), format!("/{}", entry.folder));
        self.entries.iter().map(shown).collect()
    }
}

fn shown(registration: &Registration) -> (String, String) {
    (registration.container_name.to_string(), registration.cwd.display().to_string())
}

async fn change(registry: &Registry, name: &str, change: &Change) {
    match change {
        Change::Register(folder) => registry.register(bare(name, &format!("/{folder}"))).await.unwrap(),
        Change::Deregister => registry.deregister(name, DropReason::Requested).await,
    }
}

/// Between two turns, so that no change meets one.
const BETWEEN: Duration = Duration::from_secs(1);

async fn live(steps: &[Step]) -> Result<(), TestCaseError> {
    let mut bench = Bench::over(Arc::new(tempfile::tempdir().unwrap()), Arc::default());
    let mut model = Model::default();
    bench.registry.replayed().await;
    sleep(BETWEEN).await;
    for step in steps {
        match step {
            Step::Together(name, changes) => {
                join_all(changes.iter().map(|one| change(&bench.registry, NAMES[*name], one))).await;
            }
            Step::Find(name, liveness) => bench.script.set(NAMES[*name], &[*liveness]),
            Step::Turns(turns) => sleep(TURN * *turns).await,
            Step::Restart => {
                bench = bench.next().await;
                bench.registry.replayed().await;
                sleep(BETWEEN).await;
            }
        }
        model.apply(step);
        let listed: Vec<_> = bench.registry.list().entries.iter().map(|entry| shown(entry)).collect();
        prop_assert_eq!(listed, model.shown(), "after {:?}", step);
        let home = Home::at(bench.folder.path().to_owned()).unwrap();
        let kept = super::super::file::load_all::<Registration>(&home).unwrap().into_iter();
        let kept: Vec<_> = kept.map(|loaded| shown(&loaded.found.unwrap())).collect();
        prop_assert_eq!(kept, model.shown(), "on disk after {:?}", step);
    }
    Ok(())
}

fn any_change() -> impl Strategy<Value = Change> {
    prop_oneof![
        3 => any::<u8>().prop_map(Change::Register),
        1 => Just(Change::Deregister),
    ]
}

fn any_step() -> impl Strategy<Value = Step> {
    let liveness = prop_oneof![
        2 => Just(Liveness::Alive),
        3 => Just(Liveness::Gone),
        1 => Just(Liveness::Unknown),
    ];
    prop_oneof![
        4 => (0..NAMES.len(), prop::collection::vec(any_change(), 1..5))
            .prop_map(|(name, changes)| Step::Together(name, changes)),
        3 => (0..NAMES.len(), liveness).prop_map(|(name, liveness)| Step::Find(name, liveness)),
        3 => (1_u32..4).prop_map(Step::Turns),
        1 => Just(Step::Restart),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn the_registry_does_what_its_model_does(steps in prop::collection::vec(any_step(), 1..24)) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build();
        runtime.unwrap().block_on(live(&steps))?;
    }
}
