//! Compares the registry with a model over random sequences for a few containers, with daemons that stop and start in
//! between.

use super::tests::{Fixture, INTERVAL, bare};
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
    /// Concurrent changes of one name, in this order.
    Concurrently(usize, Vec<Change>),
    /// Sets the result of later probes of a container.
    SetLiveness(usize, Liveness),
    /// Lets this number of intervals pass.
    Intervals(u32),
    /// Stops the daemon and starts the next one.
    Restart,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Entry {
    name: usize,
    folder: u8,
    misses: u32,
}

/// The model: the rules of the wire specification.
#[derive(Default)]
struct Model {
    entries: Vec<Entry>,
    found: [Option<Liveness>; NAMES.len()],
}

impl Model {
    fn apply(&mut self, step: &Step) {
        match step {
            Step::Concurrently(name, changes) => changes.iter().for_each(|change| self.change(*name, change)),
            Step::SetLiveness(name, liveness) => self.found[*name] = Some(*liveness),
            Step::Intervals(turns) => (0..*turns).for_each(|_| self.probe_all()),
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

    fn probe_all(&mut self) {
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

/// An offset between two intervals, so that no change coincides with a probe.
const OFFSET: Duration = Duration::from_secs(1);

async fn run(steps: &[Step]) -> Result<(), TestCaseError> {
    let mut fixture = Fixture::over(Arc::new(tempfile::tempdir().unwrap()), Arc::default());
    let mut model = Model::default();
    fixture.registry.replayed().await;
    sleep(OFFSET).await;
    for step in steps {
        match step {
            Step::Concurrently(name, changes) => {
                join_all(changes.iter().map(|one| change(&fixture.registry, NAMES[*name], one))).await;
            }
            Step::SetLiveness(name, liveness) => fixture.script.set(NAMES[*name], &[*liveness]),
            Step::Intervals(turns) => sleep(INTERVAL * *turns).await,
            Step::Restart => {
                fixture = fixture.next().await;
                fixture.registry.replayed().await;
                sleep(OFFSET).await;
            }
        }
        model.apply(step);
        let listed: Vec<_> = fixture.registry.list().entries.iter().map(|entry| shown(entry)).collect();
        prop_assert_eq!(listed, model.shown(), "after {:?}", step);
        let home = Home::at(fixture.folder.path().to_owned()).unwrap();
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
            .prop_map(|(name, changes)| Step::Concurrently(name, changes)),
        3 => (0..NAMES.len(), liveness).prop_map(|(name, liveness)| Step::SetLiveness(name, liveness)),
        3 => (1_u32..4).prop_map(Step::Intervals),
        1 => Just(Step::Restart),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn the_registry_matches_its_model(steps in prop::collection::vec(any_step(), 1..24)) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build();
        runtime.unwrap().block_on(run(&steps))?;
    }
}
