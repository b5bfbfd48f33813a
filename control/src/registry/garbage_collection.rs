//! Maintains registrations in the background: replays the files when the daemon starts (wire specification, A.7.5), and
//! drops containers that are gone (A.7.7).

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
use crate::registry::miss_counter::{MissCounter, ProbeReason};

/// The maximum number of concurrent probes. Each probe is a request to the Docker engine.
const PROBES_MAX: usize = 8;
/// The time limit of one probe. After it, the result is unknown.
const PROBE_TIMEOUT: Duration = Duration::from_secs(10);
/// The maximum delay from a miss after a hint to the next probe: long enough to replace a container.
const HINT_SPACING: Duration = Duration::from_secs(2);

/// Replays the files on disk by name, and then watches all registrations until the daemon stops.
pub(super) async fn run(shared: Arc<Shared>) {
    let spacing = HINT_SPACING.min(shared.options.gc_interval);
    let mut misses = MissCounter::new(shared.options.gc_misses, spacing);
    {
        let _guard = shared.replay_guard();
        shared.stopping.run_until_cancelled(replay(&shared, &mut misses)).await;
    }
    shared.stopping.run_until_cancelled(probe_periodically(&shared, misses)).await;
}

async fn replay(shared: &Arc<Shared>, misses: &mut MissCounter) {
    replay_grants(shared).await;
    let home = shared.options.home.clone();
    let loaded = match tokio::task::spawn_blocking(move || file::load_all::<Registration>(&home)).await {
        Ok(Ok(loaded)) => loaded,
        Ok(Err(error)) => return shared.notice(format!("no registration could be loaded: {error}")),
        // The runtime shuts down.
        Err(_) => return,
    };
    let valid: Vec<_> = loaded.into_iter().filter_map(|one| valid_registration(shared, one)).collect();
    let valid: Vec<_> =
        stream::iter(valid).map(|one| with_approvals(shared, one)).buffered(PROBES_MAX).collect().await;
    let valid = valid.into_iter().map(|registration| (Arc::new(registration), ProbeReason::First)).collect();
    let mut results = probes(shared, valid);
    while let Some((registration, reason, liveness)) = results.next().await {
        match liveness {
            Liveness::Gone => {
                shared.remove_file(&registration.container_name).await;
                shared.report_skipped(registration.container_name.as_str(), "container not running");
            }
            Liveness::Alive | Liveness::Unknown => {
                misses.record(&registration, liveness, reason, Instant::now());
                shared.restore(registration).await;
            }
        }
    }
}

/// Returns a registration from disk with the approvals that its user gave since it was written. A folder that does not
/// answer in time counts as one without approvals.
async fn with_approvals(shared: &Shared, registration: Registration) -> Registration {
    let (home, trust) = (shared.options.home.clone(), shared.options.approvals.file().clone());
    let mut checked = registration.clone();
    let work = move || {
        check_ports(&mut checked, &trust);
        if folder::seal_if_approved(&mut checked, &trust) {
            // If the write fails, the next start seals the file again.
            let _ = file::write(&home, &checked);
        }
        checked
    };
    match tokio::time::timeout(PROBE_TIMEOUT, tokio::task::spawn_blocking(work)).await {
        Ok(Ok(checked)) => checked,
        Ok(Err(_)) | Err(_) => registration,
    }
}

/// Loads the grants. An unreadable file grants nothing, and is kept unchanged.
async fn replay_grants(shared: &Shared) {
    let home = shared.options.home.clone();
    let loaded = match tokio::task::spawn_blocking(move || file::load_all::<Grants>(&home)).await {
        Ok(Ok(loaded)) => loaded,
        Ok(Err(error)) => return shared.notice(format!("no grant could be loaded: {error}")),
        // The runtime shuts down.
        Err(_) => return,
    };
    for Loaded { stem, found } in loaded {
        match found {
            Ok(grants) => shared.options.grants.put(grants),
            Err(invalid) => {
                let detail = match invalid {
                    InvalidFile::Mismatch(detail) => detail,
                    other => other.to_string(),
                };
                shared.notice(format!("the grants of {stem} are not in force: {detail}"));
            }
        }
    }
}

/// Returns the registration of a file, or reports why the file is skipped.
fn valid_registration(shared: &Shared, loaded: Loaded<Registration>) -> Option<Registration> {
    match loaded.found {
        Ok(registration) => Some(registration),
        Err(invalid) => {
            shared.report_skipped(&loaded.stem, &invalid.to_string());
            if let InvalidFile::Mismatch(detail) = invalid {
                shared.notice(format!("{}.json is kept as it is: {detail}", loaded.stem));
            }
            None
        }
    }
}

/// Probes containers concurrently. The results are in the order of the requests.
fn probes(
    shared: &Shared,
    due: Vec<(Arc<Registration>, ProbeReason)>,
) -> impl futures_util::Stream<Item = (Arc<Registration>, ProbeReason, Liveness)> + Unpin {
    let probe = move |(registration, reason): (Arc<Registration>, ProbeReason)| async move {
        let result = shared.options.liveness.probe(&registration);
        let liveness = tokio::time::timeout(PROBE_TIMEOUT, result).await.unwrap_or(Liveness::Unknown);
        (registration, reason, liveness)
    };
    Box::pin(stream::iter(due).map(probe).buffered(PROBES_MAX))
}

/// Probes all containers once for each interval, and hinted ones sooner, until it is cancelled. Rounds never overlap.
async fn probe_periodically(shared: &Arc<Shared>, mut misses: MissCounter) {
    let interval = shared.options.gc_interval.max(Duration::from_millis(1));
    let mut interval_timer = tokio::time::interval_at(Instant::now() + interval, interval);
    interval_timer.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let at_interval =
        |of: Vec<Arc<Registration>>| of.into_iter().map(|one| (one, ProbeReason::Interval)).collect();
    loop {
        let due = tokio::select! {
            _ = interval_timer.tick() => at_interval(shared.known.borrow().entries.clone()),
            () = shared.hinted.notified() => shared.take_hints(),
            now = next_probe(&misses) => at_interval(misses.due(now)),
        };
        misses.keep_only(&shared.known.borrow());
        let mut results = probes(shared, due);
        while let Some((registration, reason, liveness)) = results.next().await {
            if shared.is_current(&registration)
                && misses.record(&registration, liveness, reason, Instant::now())
            {
                shared.drop_gone(registration);
            }
        }
    }
}

/// Returns at the time when a container has to be probed ahead of its interval, with that time.
async fn next_probe(misses: &MissCounter) -> Instant {
    match misses.next_probe() {
        None => std::future::pending().await,
        Some(at) => {
            tokio::time::sleep_until(at).await;
            at.max(Instant::now())
        }
    }
}
