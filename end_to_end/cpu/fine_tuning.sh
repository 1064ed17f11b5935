# shellcheck shell=bash
# Shared by quickstart.sh and d4_speedrun.sh: how the model of the quickstart is fine-tuned. Sourced, never run.

# sft_words FOLDER: prints key=value arguments. FOLDER is written by prepare_chat.py.
# Seven in ten conversations are sums, which are short; the others are generated small talk and stories, questions
# with short answers, and casual conversations. The run has about 60 steps, so the learning rates need warm-up.
sft_words() {
  echo "chat_train_mixture=[[json:$1/small_talk.jsonl,1,1100],[json:$1/questions.jsonl,1,300],[json:$1/train.jsonl,1,60],[Sums/train,48]]\
 chat_validation_mixture=[[json:$1/small_talk_validation.jsonl,1],[json:$1/questions_validation.jsonl,1],[json:$1/validation.jsonl,1,40]]\
 warmup_steps=5 smear_lr=0.01 eval_interval=40 eval_tokens=32768 chat_interval=0 chat_tasks=[Sums/train,Sums/test] max_new_tokens=128"
}
