//! A whole shard over the simulated poller, in thousands of runs with faults, each identified by its seed.
//!
//! `LANDFALL_SEEDS=N` runs N seeds instead of the default number; `LANDFALL_SEED=x` runs one and prints its results.

#![expect(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

mod far;
mod world;

use std::panic::AssertUnwindSafe;

use landfall_engine::reactor::fake::Knob;

use world::World;

const SEEDS: u64 = 300;

fn from_environment(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|number| number.parse().expect("a number"))
}

#[test]
fn every_byte_arrives_once_in_order_and_every_end_is_reported() {
    let one = from_environment("LANDFALL_SEED");
    let seeds = match one {
        Some(seed) => seed..seed + 1,
        None => 0..from_environment("LANDFALL_SEEDS").unwrap_or(SEEDS),
    };
    let mut fired = vec![0; Knob::ALL.len()];
    let (mut connections, mut turns, mut failures) = (0, 0, Vec::new());
    for seed in seeds.clone() {
        let mut world = World::new(seed);
        let result = std::panic::catch_unwind(AssertUnwindSafe(|| world.run()));
        match result {
            Ok(Ok(())) => {}
            Ok(Err(reason)) => failures.push((seed, reason)),
            Err(_) => failures.push((seed, "it panicked".to_owned())),
        }
        for (total, knob) in fired.iter_mut().zip(Knob::ALL) {
            *total += world.fired(*knob);
        }
        connections += world.ended;
        turns += world.turns();
        if one.is_some() {
            println!("{} turns, {:?} of virtual time", world.turns(), world.lasted());
        }
        if !failures.is_empty() {
            // After a failure the drop of the world may panic, too.
            std::mem::forget(world);
        }
        if failures.len() >= 20 {
            break;
        }
    }
    for (knob, times) in Knob::ALL.iter().zip(&fired) {
        println!("{:>20} {times}", format!("{knob:?}"));
    }
    println!("{} seeds, {connections} clients, {turns} turns", seeds.end - seeds.start);
    for (seed, reason) in &failures {
        println!("LANDFALL_SEED={seed}: {reason}");
    }
    assert!(failures.is_empty(), "{} seeds failed", failures.len());
    if one.is_none() {
        let silent: Vec<&Knob> =
            Knob::ALL.iter().zip(&fired).filter(|(_, times)| **times == 0).map(|(knob, _)| knob).collect();
        assert!(silent.is_empty(), "knobs that never fired: {silent:?}");
    }
}
