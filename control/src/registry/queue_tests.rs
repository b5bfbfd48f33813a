use super::*;
use std::time::Duration;

use tokio::time::{Instant, sleep};

#[tokio::test(start_paused = true)]
async fn one_name_is_processed_in_order_and_names_run_concurrently() {
    let queues = Queues::default();
    let seen = Arc::new(Mutex::new(Vec::new()));
    let started = Instant::now();
    let mut answers = Vec::new();
    // Earlier work takes longer, so concurrent execution would reverse the order.
    for step in 0..4_u64 {
        for name in ["a", "b"] {
            let seen = Arc::clone(&seen);
            answers.push(queues.enqueue(name, async move {
                sleep(Duration::from_secs(4 - step)).await;
                seen.lock().unwrap().push((name, step));
            }));
        }
    }
    for answer in answers {
        assert_eq!(answer.await, Some(()));
    }
    assert_eq!(started.elapsed().as_secs(), 4 + 3 + 2 + 1);
    for name in ["a", "b"] {
        let steps: Vec<_> = seen.lock().unwrap().iter().filter(|(of, _)| *of == name).map(|s| s.1).collect();
        assert_eq!(steps, [0, 1, 2, 3]);
    }
}

#[tokio::test(start_paused = true)]
async fn work_continues_after_its_caller_has_gone_and_after_a_panic() {
    let queues = Queues::default();
    let (done, finished) = oneshot::channel();
    drop(queues.enqueue("a", async { sleep(Duration::from_secs(1)).await }));
    let failed = queues.enqueue("a", async { panic!("this one fails") });
    drop(queues.enqueue("a", async move { done.send(()) }));
    let answer: Option<()> = failed.await;
    assert_eq!(answer, None);
    finished.await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_name_without_work_is_removed() {
    let queues = Queues::default();
    queues.wait_until_idle().await;
    for number in 0..100 {
        drop(queues.enqueue(&format!("c{number}"), sleep(Duration::from_secs(number % 7))));
    }
    assert_eq!(queues.names(), 100);
    queues.wait_until_idle().await;
    assert_eq!(queues.names(), 0);
}
