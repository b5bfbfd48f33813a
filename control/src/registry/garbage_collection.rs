//! Looking after registrations without being asked: taking in what is on disk when the daemon starts (wire specification,
//! A.7.5), and forgetting containers that have gone (A.7.7).

use std::sync::Arc;
use std::time::Duration;

use futures_util::{StreamExt, stream};
use tokio::time::{Instant, MissedTickBehavior};

use super::file::{self, InvalidFile, Loaded};
use super::shared::{Shared, check_ports};
use crate::docker::liveness::Liveness;
use crate::model::grants::Grants;
use crate::model::registration::Registration;
use crate::registry::folder;
use crate::registry::miss_counter::{LookReason, MissCounter};

/// How many containers are looked at side by side. Each look is a question to the Docker engine.
const PROBES_MAX: usize = 8;
/// How long one look may take; a longer one is unknown.
const PROBE_TIMEOUT: Duration = Duration::from_secs(10);
/// How long after a miss that a hint led to the next look follows, at most: long enough for a container to be replaced.
const HINT_SPACING: Duration = Duration::from_secs(2);

/// Takes in what is on disk, by name, and then looks after all registrations until the daemon stops.
pub(super) async fn run(shared: Arc<Shared>) {
    let spacing = HINT_SPACING.min(shared.options.gc_interval);
    let mut misses = MissCounter::new(shared.options.gc_misses, spacing);
    {
        let _settling = shared.settling();
        shared.stopping.run_until_cancelled(replay(&shared, &mut misses)).await;
    }
    shared.stopping.run_until_cancelled(look_after(&shared, misses)).await;
}

async fn replay(shared: &Arc<Shared>, misses: &mut MissCounter) {
    replay_grants(shared).await;
    let home = shared.options.home.clone();
    let loaded = match tokio::task::spawn_blocking(move || file::load_all::<Registration>(&home)).await {
        Ok(Ok(loaded)) => loaded,
        Ok(Err(error)) => return shared.notice(format!("no registration was taken in: {error}")),
        // The runtime ends.
        Err(_) => return,
    };
    let whole: Vec<_> = loaded.into_iter().filter_map(|one| taken(shared, one)).collect();
    let whole: Vec<_> =
        stream::iter(whole).map(|one| with_approvals(shared, one)).buffered(PROBES_MAX).collect().await;
    let whole = whole.into_iter().map(|registration| (Arc::new(registration), LookReason::First)).collect();
    let mut looked = probes(shared, whole);
    while let Some((registration, look, liveness)) = looked.next().await {
        match liveness {
            Liveness::Gone => {
                shared.remove_file(&registration.container_name).await;
                shared.skipped(registration.container_name.as_str(), "container not running");
            }
            Liveness::Alive | Liveness::Unknown => {
                misses.seen(&registration, liveness, look, Instant::now());
                shared.take_in(registration).await;
            }
        }
    }
}

/// A registration from disk, with what its user approved since it was written. A folder that does not answer in time is taken
/// as one without approvals.
async fn with_approvals(shared: &Shared, registration: Registration) -> Registration {
    let (home, trust) = (shared.options.home.clone(), shared.options.approvals.file().clone());
    let mut checked = registration.clone();
    let work = move || {
        check_ports(&mut checked, &trust);
        if folder::seal_if_approved(&mut checked, &trust) {
            // Where the write fails, the next start seals it again.
            let _ = file::write(&home, &checked);
        }
        checked
    };
    match tokio::time::timeout(PROBE_TIMEOUT, tokio::task::spawn_blocking(work)).await {
        Ok(Ok(checked)) => checked,
        Ok(Err(_)) | Err(_) => registration,
    }
}

/// Reads what was granted. A file that cannot be read grants nothing, and is kept as it is.
async fn replay_grants(shared: &Shared) {
    let home = shared.options.home.clone();
    let loaded = match tokio::task::spawn_blocking(move || file::load_all::<Grants>(&home)).await {
        Ok(Ok(loaded)) => loaded,
        Ok(Err(error)) => return shared.notice(format!("no grant was read: {error}")),
        // The runtime ends.
        Err(_) => return,
    };
    for Loaded { stem, found } in loaded {
        match found {
            Ok(grants) => shared.options.grants.put(grants),
            Err(unfit) => {
                let detail = match unfit {
                    InvalidFile::Mismatch(detail) => detail,
                    other => other.to_string(),
                };
                shared.notice(format!("the grants of {stem} are not in force: {detail}"));
            }
        }
    }
}

/// What a file holds; or why it holds nothing, which is told.
fn taken(shared: &Shared, loaded: Loaded<Registration>) -> Option<Registration> {
    match loaded.found {
        Ok(registration) => Some(registration),
        Err(unfit) => {
            shared.skipped(&loaded.stem, &unfit.to_string());
            if let InvalidFile::Mismatch(detail) = unfit {
                shared.notice(format!("{}.json is kept as it is: {detail}", loaded.stem));
            }
            None
        }
    }
}

/// Looks at containers, several side by side; the answers come in the order of the questions.
fn probes(
    shared: &Shared,
    of: Vec<(Arc<Registration>, LookReason)>,
) -> impl futures_util::Stream<Item = (Arc<Registration>, LookReason, Liveness)> + Unpin {
    let probe = move |(registration, look): (Arc<Registration>, LookReason)| async move {
        let looked = shared.options.liveness.probe(&registration);
        let liveness = tokio::time::timeout(PROBE_TIMEOUT, looked).await.unwrap_or(Liveness::Unknown);
        (registration, look, liveness)
    };
    Box::pin(stream::iter(of).map(probe).buffered(PROBES_MAX))
}

/// One look at a time: at everything once a turn, and sooner at those that a hint was about.
async fn look_after(shared: &Arc<Shared>, mut misses: MissCounter) {
    let interval = shared.options.gc_interval.max(Duration::from_millis(1));
    let mut turns = tokio::time::interval_at(Instant::now() + interval, interval);
    turns.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let in_turn =
        |of: Vec<Arc<Registration>>| of.into_iter().map(|one| (one, LookReason::LookTurn)).collect();
    loop {
        let of = tokio::select! {
            _ = turns.tick() => in_turn(shared.known.borrow().entries.clone()),
            () = shared.hinted.notified() => shared.take_hints(),
            now = next_look(&misses) => in_turn(misses.due(now)),
        };
        misses.keep_only(&shared.known.borrow());
        let mut looked = probes(shared, of);
        while let Some((registration, look, liveness)) = looked.next().await {
            if shared.is_current(&registration) && misses.seen(&registration, liveness, look, Instant::now())
            {
                shared.drop_gone(registration);
            }
        }
    }
}

/// Returns when a container has to be looked at ahead of its turn, and the time then.
async fn next_look(misses: &MissCounter) -> Instant {
    match misses.next_look() {
        None => std::future::pending().await,
        Some(at) => {
            tokio::time::sleep_until(at).await;
            at.max(Instant::now())
        }
    }
}
